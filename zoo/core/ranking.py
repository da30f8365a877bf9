"""How well scores order samples."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAUROC
from torchmetrics.utilities import dim_zero_cat


class MeanAUROC(MulticlassAUROC):
    r"""Area under the receiver operating characteristic of each class against the others, and its mean.

    .. math:: \tfrac{1}{|K|} \sum_{c \in K} P(p_c(x) > p_c(x') \mid y = c, y' \neq c) + \tfrac12 P(\text{equal})

    K are the classes that occur, but not alone; NaN without any. Exact: all scores are kept, 4·N·C bytes.

    Fed with (logits (B, C), labels (B,)).

    Args:
        num_classes: C.
        ignore_index: the label of samples that do not count, if there are any.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        super().__init__(num_classes, average="none", thresholds=None, ignore_index=ignore_index, validate_args=False)

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Keep the probabilities of a batch."""
        super().update(logits.float().softmax(dim=1), labels)

    def compute(self) -> Tensor:  # type: ignore[override]
        """The mean."""
        labels: Tensor = dim_zero_cat(self.target)  # type: ignore[arg-type]
        if not len(labels):
            return labels.new_full((), torch.nan, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class that does not occur is left out below
            areas = super().compute()
        counts = torch.bincount(labels, minlength=len(areas))
        able = (counts > 0) & (counts < len(labels))
        return areas[able].mean()
