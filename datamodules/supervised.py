"""Labels only: the baseline of every regime."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from datamodules.base import Data, Role
from datamodules.sources.base import Source
from datamodules.splits import Split, balanced


class SupervisedData(Data):
    """Some or all of the training set, labelled.

    With the same source, seed, ``val_size`` and number of labels, :class:`SemiSupervisedData` has the same labelled
    and validation samples: what it gains, it gains from the unlabelled ones.

    Batch: ``labeled`` {image, label, index}.

    Args:
        source: where samples come from.
        labels_per_class: labelled samples of every class; all if none of the three is given.
        num_labels: labelled samples in total, spread over the classes as evenly as can be.
        labeled_fraction: labelled share of every class.
        imbalance: make the labelled samples long-tailed, see :class:`~datamodules.SemiSupervisedData`.
        balance_labels: repeat the labelled samples of rare classes until every class has as many.
        batch_size: samples per process and step.
        **kwargs: see :class:`~datamodules.base.Data`.
    """

    def __init__(
        self,
        source: Source,
        labels_per_class: int | None = None,
        num_labels: int | None = None,
        labeled_fraction: float | None = None,
        imbalance: float | None = None,
        balance_labels: bool = False,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(source, batch_size, **kwargs)
        self.labels_per_class = labels_per_class
        self.num_labels = num_labels
        self.labeled_fraction = labeled_fraction
        self.imbalance = imbalance
        self.balance_labels = balance_labels

    def make_split(self, labels: Tensor) -> Split:
        """Validation first, labels from the rest."""
        rest, val = self.hold_out(labels)
        labeled = self.choose_labeled(
            labels, rest, self.labels_per_class, self.num_labels, self.labeled_fraction, self.imbalance
        )
        return Split({"labeled": labeled, "val": val}, len(labels), self.seed, self.source.name)

    def make_roles(self) -> dict[str, Role]:
        """One role: ``labeled``."""
        train, labeled = self._train(self.source), self.parts["labeled"]
        samples = train.subset(balanced(train.labels, labeled) if self.balance_labels else labeled)
        return {"labeled": Role(samples, self.batch_size, {"image": self.default_weak(self.source)})}
