"""FixMatch as unsupervised domain adaptation: source samples are the labeled ones, target samples the unlabeled.

Sohn et al., NeurIPS 2020, https://arxiv.org/abs/2001.07685
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.domain_adaptation.base import DomainAdaptation


class FixMatchAdaptation(DomainAdaptation):
    r"""Confident predictions on weak views of the target label its strong views.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s)) + \lambda \tfrac1{B_t} \sum_j \mathbb 1[\max q_j \ge \tau]\,
        H(\arg\max q_j, p(A(x_j^t))), \qquad q_j = p(\alpha(x_j^t))

    :math:`\alpha` is the weak view, A the strong one; no gradient flows through q. The mean runs over all target
    samples.

    Batch: ``source`` {image, label}, ``target`` {weak, strong}.

    Args:
        self_training_weight: λ ≥ 0.
        threshold: τ in (0, 1]; 0.9 in TLlib, where VisDA has 0.8 and semi-supervised learning 0.95.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`. TLlib passes source, weak and strong views
            one after the other, the weak ones first; their statistics count in BatchNorm.

    Raises:
        UserError: for an argument out of its range.

    Source: Sohn et al. 2020, arXiv 2001.07685, equations 3-4; the recipe for domain adaptation is TLlib's.
    """

    card = Card(
        title="FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence",
        year=2020,
        paper="arXiv:2001.07685",
        family="domain_adaptation",
        roles=("source", "target"),
    )
    target_views: ClassVar[tuple[str, ...]] = ("weak", "strong")
    published_forward_pass: ClassVar[Literal["joint", "split"]] = "split"

    def __init__(self, self_training_weight: float = 1.0, threshold: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self_training_weight < 0.0:
            raise UserError(f"FixMatchAdaptation: self_training_weight={self_training_weight} must not be negative")
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"FixMatchAdaptation: threshold={threshold} must lie in (0, 1]")
        self.self_training_weight, self.threshold = self_training_weight, threshold

    def views(self, source: Tensor, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the three; those of the weak view carry no gradient."""
        if self.forward_pass == "split":
            with torch.no_grad():
                weak_logits = self.network(weak)
            return self.on_source(self.network, source), weak_logits, self.network(strong)
        sizes = [len(source), len(weak), len(strong)]
        logits, weak_logits, strong_logits = self.network(torch.cat([source, weak, strong])).split(sizes)
        return logits, weak_logits.detach(), strong_logits

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels, and the target's strong views to its confident weak views."""
        source, target = batch["source"], batch["target"]
        logits, weak, strong = self.views(source["image"], target["weak"], target["strong"])
        confidence, pseudo_labels = weak.float().softmax(dim=1).max(dim=1)
        confident = (confidence >= self.threshold).to(strong.dtype)
        self.observe(utilization=confident.mean())
        losses = cross_entropy(strong, pseudo_labels, reduction="none")
        return self.report(
            source=cross_entropy(logits, source["label"]),
            self_training=self.self_training_weight * (confident * losses).mean(),
        )
