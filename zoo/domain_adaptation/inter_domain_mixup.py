"""Mixup between domains.

Yan et al., 2020, https://arxiv.org/abs/2001.00677; Zhang et al., ICLR 2018, https://arxiv.org/abs/1710.09412
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.domain_adaptation.generalization import Batch, DomainGeneralization
from zoo.losses.domain_means import cross_domain_partners
from zoo.losses.mixup import mixing_shares


class InterDomainMixup(DomainGeneralization):
    r"""Images between a domain and the next one, with the labels of both.

    .. math:: L = \frac1B \sum_i \lambda_i H(y_i, p(\tilde x_i)) + (1 - \lambda_i) H(y_{\pi(i)}, p(\tilde x_i)),
        \quad \tilde x_i = \lambda_i x_i + (1 - \lambda_i) x_{\pi(i)}, \quad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    The domains stand in a random ring that is drawn anew at every step; a sample is mixed with one of the next domain,
    each of which is taken once. All samples of a domain share one λ, as in DomainBed. Every rank draws for itself.

    Batch: ``source`` {image, label, domain}, floating-point images, as many samples of every domain.

    Args:
        alpha: α ≥ 0; 0 mixes nothing.
        **kwargs: see :class:`~zoo.domain_adaptation.generalization.DomainGeneralization`.

    Raises:
        UserError: for a negative ``alpha``; in training, for inputs that cannot be mixed.

    Source: Yan et al. 2020, arXiv 2001.00677, section 3.1 (its consistency loss is left out, as in DomainBed).
    """

    card = Card(
        title="Improve Unsupervised Domain Adaptation with Mixup Training",
        year=2020,
        paper="arXiv:2001.00677",
        family="domain_adaptation",
        roles=("source",),
    )

    def __init__(self, alpha: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not alpha >= 0.0:
            raise UserError(f"InterDomainMixup: alpha={alpha} must not be negative")
        self.alpha = alpha

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mix every domain with the next, and fit both labels."""
        x, labels, domain = (batch["source"][key] for key in ("image", "label", "domain"))
        if not x.is_floating_point():
            raise UserError(f"InterDomainMixup: inputs of {x.dtype} cannot be mixed; it needs images")
        order, draws = torch.randperm(self.num_domains), mixing_shares(self.num_domains, self.alpha, dominant=False)
        partners, places = cross_domain_partners(domain, self.num_domains, order)
        share = draws.to(x)[places]
        logits = self.network(torch.lerp(x[partners], x, share.view(-1, *[1] * (x.ndim - 1))))
        own = share * cross_entropy(logits, labels, reduction="none")
        other = (1 - share) * cross_entropy(logits, labels[partners], reduction="none")
        return self.report(source=(own + other).mean())
