"""Learning to Generalize: Meta-Learning for Domain Generalization (MLDG).

Li et al., AAAI 2018, https://arxiv.org/abs/1710.03463
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.distributed import sum_across_ranks, sum_with_gradient, world_size
from zoo.core.errors import UserError, check_choice
from zoo.domain_adaptation.generalization import Batch, DomainGeneralization
from zoo.losses.domain_means import domain_rows
from zoo.optim.virtual import with_parameters


class MLDG(DomainGeneralization):
    r"""A step on some domains should help on the others.

    .. math:: L = F(\theta) + \beta\, G\big( \theta - \alpha \nabla F(\theta) \big)

    F is the risk on the meta-train domains and G that on the meta-test domains, drawn anew at every step. Paper and
    TLlib differentiate through the inner step (``order="second"``); DomainBed takes :math:`\nabla G` at the moved
    weights for that at θ (``order="first"``), at half the price.

    DomainBed's code differs in more: its inner step is the first of a fresh Adam, which moves every weight by the
    learning rate against the sign of its gradient (``inner_step="sign"``); each meta-train domain is paired with one
    meta-test domain and moves on its own, so that with 3 domains, 2 of them for the test, one is never looked at; its
    BatchNorm never remembers anything, as only copies of the network are run. Here F and G are means over their
    domains, and BatchNorm remembers the first pass.

    On several ranks the domains are the same and the inner step is the mean of all; the second order is that of each
    rank's own samples.

    Batch: ``source`` {image, label, domain}, as many samples of every domain.

    Args:
        inner_lr: α > 0. The paper's is the outer rate; DomainBed's and TLlib's, too.
        test_weight: β ≥ 0, 1 in all three; 0 learns from the meta-train domains alone.
        test_domains: number of meta-test domains, at least 1 and less than all; 1 in TLlib, 2 in DomainBed.
        order: ``"first"`` or ``"second"``.
        inner_step: ``"gradient"`` or, first order only, ``"sign"``.
        **kwargs: see :class:`~zoo.domain_adaptation.generalization.DomainGeneralization`.

    Raises:
        UserError: if an argument is out of its range; in training, for unequal numbers of samples.

    Source: Li et al. 2018, arXiv 1710.03463, algorithm 1 and equation 3.
    """

    card = Card(
        title="Learning to Generalize: Meta-Learning for Domain Generalization",
        year=2018,
        paper="arXiv:1710.03463",
        family="domain_adaptation",
        roles=("source",),
    )

    def __init__(
        self,
        inner_lr: float = 0.01,
        test_weight: float = 1.0,
        test_domains: int = 1,
        order: Literal["first", "second"] = "second",
        inner_step: Literal["gradient", "sign"] = "gradient",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not inner_lr > 0.0 or not test_weight >= 0.0:
            raise UserError(
                f"MLDG: inner_lr={inner_lr} must be positive and test_weight={test_weight} must not be negative"
            )
        if not 1 <= test_domains < self.num_domains:
            raise UserError(
                f"MLDG: test_domains={test_domains} must be at least 1 and less than num_domains={self.num_domains}"
            )
        check_choice("MLDG", "order", order, ("first", "second"))
        check_choice("MLDG", "inner_step", inner_step, ("gradient", "sign"))
        if (order, inner_step) == ("second", "sign"):
            raise UserError("MLDG: inner_step='sign' has no second order: give order: first")
        self.inner_lr, self.test_weight, self.test_domains = inner_lr, test_weight, test_domains
        self.order, self.inner_step = order, inner_step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit some domains, and the others from where that leads."""
        x, labels, domain = (batch["source"][key] for key in ("image", "label", "domain"))
        scores = sum_across_ranks(torch.rand(self.num_domains).to(x.device))  # the same domains on all ranks
        rows = domain_rows(domain, self.num_domains)[scores.argsort()]
        test, train = rows[: self.test_domains].flatten(), rows[self.test_domains :].flatten()
        second = self.order == "second"
        with sdpa_kernel(SDPBackend.MATH) if second else torch.enable_grad():  # fused attention has no second order
            train_risk = cross_entropy(self.network(x[train]), labels[train])
        moved = self.moved(train_risk, second)
        with frozen_batch_norm(self.network):
            test_risk = cross_entropy(with_parameters(self.network, moved, self.network, x[test]), labels[test])
        return self.report(meta_train=train_risk, meta_test=self.test_weight * test_risk)

    def moved(self, risk: Tensor, second: bool) -> dict[str, Tensor]:
        """The parameters after the inner step, by name, with a graph to where they were."""
        named = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        with torch.autocast(risk.device.type, enabled=False):
            found = torch.autograd.grad(
                risk, list(named.values()), create_graph=second, retain_graph=True, allow_unused=True
            )
        moved: dict[str, Tensor] = dict(named)
        for (name, p), gradient in zip(named.items(), found, strict=True):
            if gradient is None:
                continue
            mean = sum_with_gradient(gradient) / world_size() if second else sum_across_ranks(gradient) / world_size()
            step = mean.sign() if self.inner_step == "sign" else mean
            moved[name] = p - self.inner_lr * step
        return moved
