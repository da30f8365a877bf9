"""Fishr: Invariant Gradient Variances for Out-of-Distribution Generalization.

Rame et al., ICML 2022, https://arxiv.org/abs/2109.02934
"""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.domain_adaptation.generalization import AnnealedPenalty, Batch
from zoo.losses.invariance import gradient_variances, variance_distance


class Fishr(AnnealedPenalty):
    r"""Gradients of the head that vary alike in all domains.

    .. math:: L = \tfrac1S \sum_s R_s + \lambda_t \tfrac1S \sum_s \tfrac1P \lVert \tilde v_s - \bar v \rVert^2, \qquad
        \tilde v_s = \frac{m \tilde v_s' + (1 - m) v_s}{1 - m}

    :math:`v_s` is the variance, over the samples of domain s, of the gradients with respect to the P parameters of the
    linear head; they have a closed form. :math:`\tilde v'_s` is the moving average of earlier steps, which carries no
    gradient. It is divided by 1 - m, as in the authors' code, so that the size of the gradient does not depend on m;
    the penalty's own value does.

    Batch: ``source`` {image, label, domain}; the head must be linear.

    Args:
        penalty_weight: λ ≥ 0 from ``annealing_steps`` on; DomainBed's 1,000.
        annealing_steps: optimizer steps before; DomainBed's 1,500 of 5,000. The averages move from the start.
        early_weight: λ before, 0 in DomainBed.
        momentum: m in [0, 1).
        **kwargs: see :class:`~zoo.domain_adaptation.generalization.AnnealedPenalty`.

    Raises:
        UserError: if an argument is out of its range, or for another head.

    Source: Rame et al. 2022, arXiv 2109.02934, equations 3-5; the averages as in the authors' code.
    """

    card = Card(
        title="Fishr: Invariant Gradient Variances for Out-of-Distribution Generalization",
        year=2022,
        paper="arXiv:2109.02934",
        family="domain_adaptation",
        roles=("source",),
    )
    variances: Tensor

    def __init__(
        self,
        penalty_weight: float = 1000.0,
        annealing_steps: int = 1500,
        early_weight: float = 0.0,
        momentum: float = 0.95,
        **kwargs: Any,
    ) -> None:
        super().__init__(penalty_weight, annealing_steps, early_weight, **kwargs)
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"Fishr: momentum={momentum} must lie in [0, 1)")
        self.momentum = momentum

    def build(self) -> None:
        """The network, and the averages of its head's variances (S, C, D + 1)."""
        super().build()
        if not isinstance(self.network.head, nn.Linear):
            raise UserError(f"Fishr: the head must be Linear, not {type(self.network.head).__name__}")
        width = self.network.num_features + (self.network.head.bias is not None)
        self.register_buffer("variances", torch.zeros(self.num_domains, self.num_classes, width))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit the labels with gradients that vary alike."""
        source = batch["source"]
        features = self.network.dropout(self.network.features(source["image"]))  # what the head takes in
        logits = self.network.head(features)
        found, counts = gradient_variances(features, logits, source["label"], source["domain"], self.num_domains)
        found = found[..., : self.variances.shape[2]]
        seen = (counts > 0).view(-1, 1, 1)
        averages = torch.where(seen, torch.lerp(found, self.variances.to(found), self.momentum), self.variances)
        if self.training:
            self.variances = averages.detach().to(self.variances)
        penalty = variance_distance(averages / (1 - self.momentum), counts)
        return self.penalized(*self.risks(logits, source), penalty=penalty)
