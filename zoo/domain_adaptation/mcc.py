"""Minimum Class Confusion for Versatile Domain Adaptation.

Jin et al., ECCV 2020, https://arxiv.org/abs/1912.03699
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.distributed import gather_with_gradient
from zoo.core.errors import UserError
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.losses.class_confusion import class_confusion


class MCC(DomainAdaptation):
    r"""The classes of the target's predictions are not confused with each other; no domains are aligned.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s)) + \lambda \tfrac1K \sum_k \sum_{k' \ne k}
        \frac{C_{kk'}}{\sum_j C_{kj}}, \qquad C = P^\top W P, \quad P = \mathrm{softmax}(Z^t / T)

    W weighs certain samples more, see :func:`~zoo.losses.class_confusion.class_confusion`. The target samples of all
    ranks count together.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        confusion_weight: λ ≥ 0.
        temperature: T > 0; TLlib takes 3 for VisDA.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`; authors and TLlib pass the domains jointly.

    Raises:
        UserError: for an argument out of its range.

    Source: Jin et al. 2020, arXiv 1912.03699, equations 2-8.
    """

    card = Card(
        title="Minimum Class Confusion for Versatile Domain Adaptation",
        year=2020,
        paper="arXiv:1912.03699",
        family="domain_adaptation",
        roles=("source", "target"),
    )

    def __init__(self, confusion_weight: float = 1.0, temperature: float = 2.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if confusion_weight < 0.0:
            raise UserError(f"MCC: confusion_weight={confusion_weight} must not be negative")
        if temperature <= 0.0:
            raise UserError(f"MCC: temperature={temperature} must be positive")
        self.confusion_weight, self.temperature = confusion_weight, temperature

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels; tell the target's classes apart."""
        source, target = batch["source"], batch["target"]
        source_logits, target_logits = self.both(source["image"], target["image"], self.network)
        confusion = class_confusion(gather_with_gradient(target_logits), self.temperature)
        return self.report(
            source=cross_entropy(source_logits, source["label"]),
            confusion=self.confusion_weight * confusion,
        )
