"""Temporal Ensembling for Semi-Supervised Learning: the Pi-model.

Laine and Aila, ICLR 2017, https://arxiv.org/abs/1610.02242
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.core.card import Card
from zoo.core.schedules import sigmoid_ramp
from zoo.losses import squared_error
from zoo.semi_supervised.consistency import Consistency


class PiModel(Consistency):
    r"""Two views of a sample, and two draws of dropout, get the same prediction.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + r(t)\, \lambda\, \tfrac1{\mu B C} \sum_b
        \lVert p(\alpha_2(u_b)) - p(\alpha_1(u_b)) \rVert^2, \quad r(t) = e^{-5 (1 - t)^2}

    :math:`t` is the completed share of the ramp. The second prediction follows the first, which carries no gradient, as
    in the code of Oliver et al. 2018 (arXiv 1804.09170) and since; in the paper's the gradient flows through both.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, weak_2, hidden_label (watched only)}.

    Args:
        unlabeled_weight: λ ≥ 0, 10 as in the code of MixMatch's authors; Oliver et al. have 20, the paper 100 times the
            share of labels.
        symmetric: let the gradient flow through both predictions.
        **kwargs: ``ramp`` and ``forward_pass`` of :class:`~zoo.semi_supervised.consistency.Consistency`, and those of
            its bases.

    Source: Laine and Aila 2017, arXiv 1610.02242, algorithm 1.
    """

    card = Card(
        title="Temporal Ensembling for Semi-Supervised Learning: the Pi-model",
        year=2017,
        paper="arXiv:1610.02242",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "weak_2")

    def __init__(self, unlabeled_weight: float = 10.0, symmetric: bool = False, **kwargs: Any) -> None:
        super().__init__(unlabeled_weight=unlabeled_weight, **kwargs)
        self.symmetric = symmetric

    @property
    def ramped(self) -> float:
        r""":math:`r(t)` at this step: the paper's Gaussian, from 0.007."""
        return sigmoid_ramp(self.progress, self.ramp)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels, and one prediction to the other."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        first, second = unlabeled["weak"], unlabeled["weak_2"]
        learning, watched = ([second, first], []) if self.symmetric else ([second], [first])
        logits, own, other = self.logits(labeled["image"], learning, watched)
        targets = other.float().softmax(dim=1)
        self.watch(unlabeled, targets, torch.ones_like(targets[:, 0]))
        return self.report(
            supervised=self.criterion(logits, labeled["label"]),
            unlabeled=self.ramped * self.unlabeled_weight * squared_error(own, targets),
        )
