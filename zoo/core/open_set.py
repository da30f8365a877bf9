"""Measures for a test set with samples of classes that nobody has learnt."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.core.errors import UserError


class OpenSetAccuracy(Metric):
    r"""Accuracies over C known classes, over what is unknown, and their harmonic mean.

    .. math:: \mathrm{OS}^* = \frac1C \sum_{c < C} a_c, \quad \mathrm{UNK} = a_C, \quad
        \mathrm{HOS} = \frac{2\, \mathrm{OS}^*\, \mathrm{UNK}}{\mathrm{OS}^* + \mathrm{UNK}}

    with :math:`a_c` the share of samples of class c that are said to be of it. Classes that no sample has are left out
    of the mean. HOS is 0 where either is.

    Fed with (logits, labels): logits (B, C), whose largest probability below ``threshold`` says unknown, or (B, C + 1),
    whose last output does; labels (B,) in 0..C, C the unknown. A class that nobody can tell from the labels, -1, is
    left out. Gives ``accuracy`` over all samples and ``known_accuracy`` (OS*); and ``unknown_accuracy`` and ``hos``
    where samples of the unknown were seen.

    Args:
        num_classes: C.
        threshold: in [0, 1]; without one, a network of C outputs never says unknown, and HOS is 0.

    Raises:
        UserError: for a threshold out of its range, or another number of logits.

    Source: Bucci et al. 2020, arXiv 2007.12360 (HOS).
    """

    full_state_update = False
    right: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, threshold: float | None = None) -> None:
        super().__init__()
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"OpenSetAccuracy: threshold={threshold} must be in 0..1")
        self.num_classes, self.threshold = num_classes, threshold
        self.add_state("right", torch.zeros(num_classes + 1), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(num_classes + 1), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch."""
        if logits.shape[1] not in (self.num_classes, self.num_classes + 1):
            raise UserError(
                f"OpenSetAccuracy: {logits.shape[1]} logits for {self.num_classes} known classes; they must be as "
                "many, or one more for the unknown"
            )
        largest, said = logits.float().softmax(dim=1).max(dim=1)
        if self.threshold is not None and logits.shape[1] == self.num_classes:
            said = torch.where(largest < self.threshold, self.num_classes, said)
        known = (labels >= 0).to(self.seen.dtype)
        where = labels.clamp_min(0)
        self.seen.scatter_add_(0, where, known)
        self.right.scatter_add_(0, where, known * (said == labels))

    def compute(self) -> dict[str, Tensor]:
        """The accuracies."""
        accuracies = self.right / self.seen.clamp_min(1)
        known = accuracies[:-1].sum() / (self.seen[:-1] > 0).sum().clamp_min(1)
        found = {"accuracy": self.right.sum() / self.seen.sum().clamp_min(1), "known_accuracy": known}
        if bool(self.seen[-1] > 0):  # a source's own hold-out has none
            unknown = accuracies[-1]
            found |= {"unknown_accuracy": unknown, "hos": 2 * known * unknown / (known + unknown).clamp_min(1e-12)}
        return found
