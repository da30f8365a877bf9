"""What is minimised on labeled samples: a small module, so that a criterion may know the class frequencies."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.core.errors import UserError


class Criterion(nn.Module):
    """Base of the criteria: logits (B, C) and labels (B,), or (B, C) where they are soft → the loss, a scalar.

    Args:
        num_classes: number of classes C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch."""
        raise NotImplementedError

    def prepare(self, counts: Tensor) -> None:
        """Be told, once before training, how many labeled samples each class has, (C,)."""


class CrossEntropy(Criterion):
    r""":math:`-\tfrac1B \sum_b \log p_{y_b}(x_b)`.

    Args:
        num_classes: number of classes C.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1).

    Raises:
        UserError: if ``label_smoothing`` is outside [0, 1).
    """

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__(num_classes)
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"CrossEntropy: label_smoothing={label_smoothing} must lie in [0, 1)")
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch."""
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def class_counts(data: Any, num_classes: int) -> Tensor | None:
    """Labeled samples per class (C,) of a data module after ``setup("fit")``; ``None`` where it has no such role."""
    roles = getattr(data, "roles", None)
    if not isinstance(roles, dict) or "labeled" not in roles:
        return None
    labels = roles["labeled"].samples.labels
    return torch.bincount(labels[labels >= 0], minlength=num_classes)
