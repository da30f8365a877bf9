"""Semi-supervised Learning by Entropy Minimization.

Grandvalet and Bengio, NIPS 2004
"""

from typing import Any

import torch
from torch import Tensor

from zoo.core.card import Card
from zoo.losses import entropy
from zoo.semi_supervised.consistency import Consistency


class EntMin(Consistency):
    r"""Classes should not overlap, so predictions should be sure.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + r(t)\, \lambda\, \tfrac1{\mu B} \sum_b H(p(u_b)),
        \quad H(p) = -\sum_c p_c \log p_c

    Pseudo-labels' soft relative: the target is the prediction itself, and carries a gradient.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, hidden_label (watched only)}.

    Args:
        unlabeled_weight: λ ≥ 0. The paper chooses it on held-out labels; 0.06 is Oliver et al.'s (arXiv 1804.09170).
        **kwargs: ``ramp`` and ``forward_pass`` of :class:`~zoo.semi_supervised.consistency.Consistency`, and those of
            its bases.

    Source: Grandvalet and Bengio 2004, equation 6.
    """

    card = Card(
        title="Semi-supervised Learning by Entropy Minimization",
        year=2004,
        paper="",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(self, unlabeled_weight: float = 0.06, **kwargs: Any) -> None:
        super().__init__(unlabeled_weight=unlabeled_weight, **kwargs)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels, and be sure of the rest."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        logits, own = self.logits(labeled["image"], [unlabeled["weak"]])
        self.watch(unlabeled, own.detach().argmax(dim=1), torch.ones_like(own[:, 0]))
        return self.report(
            supervised=self.criterion(logits, labeled["label"]),
            unlabeled=self.ramped * self.unlabeled_weight * entropy(own).mean(),
        )
