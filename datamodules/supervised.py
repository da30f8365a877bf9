"""Labels only: the baseline of every regime."""

from __future__ import annotations

from torch import Tensor

from datamodules.base import Data, Role
from datamodules.sources.base import Source
from datamodules.splits import Split
from datamodules.transforms import View


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
        batch_size: samples per process and step.
        steps: optimizer steps of an epoch.
        eval_batch_size: samples per process and step in validation, test and prediction.
        val_size: labelled samples held out for validation: a number, or a share of the training set.
        weak: view of the training images; by default a shift, with a mirror where the source allows.
        num_workers: processes that read ahead; 0 is fastest for sources in memory.
        seed: of splits, orders and views.
        split: a split.json of an earlier run, to use the same samples.
        allow_repeats: accept a labelled set smaller than a batch.
        views_in_workers: make views in the workers; by default for streaming sources when there are workers.
        predict_folder: predict on all images below this folder instead of the test set.
        pin_memory: page-locked batches, with workers and a GPU.
    """

    def __init__(
        self,
        source: Source,
        labels_per_class: int | None = None,
        num_labels: int | None = None,
        labeled_fraction: float | None = None,
        batch_size: int = 64,
        steps: int = 100,
        eval_batch_size: int = 256,
        val_size: int | float = 0.1,
        weak: View | None = None,
        num_workers: int = 0,
        seed: int = 0,
        split: str | None = None,
        allow_repeats: bool = False,
        views_in_workers: bool | None = None,
        predict_folder: str | None = None,
        pin_memory: bool = True,
    ) -> None:
        super().__init__(
            source,
            batch_size,
            steps,
            eval_batch_size,
            val_size,
            weak,
            num_workers,
            seed,
            split,
            allow_repeats,
            views_in_workers,
            predict_folder,
            pin_memory,
        )
        self.labels_per_class = labels_per_class
        self.num_labels = num_labels
        self.labeled_fraction = labeled_fraction

    def make_split(self, labels: Tensor) -> Split:
        """Validation first, labels from the rest."""
        rest, val = self.hold_out(labels)
        labeled = self.choose_labeled(labels, rest, self.labels_per_class, self.num_labels, self.labeled_fraction)
        return Split({"labeled": labeled, "val": val}, len(labels), self.seed, self.source.name)

    def make_roles(self) -> dict[str, Role]:
        """One role: ``labeled``."""
        samples = self._train(self.source).subset(self.parts["labeled"])
        return {"labeled": Role(samples, self.batch_size, {"image": self.default_weak(self.source)})}
