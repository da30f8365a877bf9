"""Few labels and many unlabelled samples of the same distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.base import UNLABELED, Role
from datamodules.pseudo_labels import PseudoLabels, read_pseudo_labels
from datamodules.sources.base import FileSamples, Samples, Source, TensorSamples, TokenSamples
from datamodules.splits import Split, balanced, counts, generator, long_tailed, stratified
from datamodules.transforms import View
from zoo.core.errors import UserError


class SemiSupervisedData(PseudoLabels):
    r"""A few labelled samples; the others come without labels, as a weak and a strong view.

    A step sees :math:`B` labelled and :math:`\mu B` unlabelled samples per process. What the source itself brings
    without labels (STL-10, SVHN extra) joins the unlabelled samples.

    Batch: ``labeled`` {image, label, index}, ``unlabeled`` {weak, strong, index, hidden_label, pseudo_label,
    has_pseudo_label}, or other views where the method names them in ``labeled_views`` and ``unlabeled_views``: what no
    method looks at is not made. The last two are what a ``PseudoLabeler`` among the callbacks last gave, where there is
    one, see :class:`~datamodules.pseudo_labels.PseudoLabels`.

    Args:
        source: where samples come from.
        labels_per_class: labelled samples of every class.
        num_labels: labelled samples in total, spread over the classes as evenly as can be.
        labeled_fraction: labelled share of every class.
        imbalance: ratio γ of the most to the least frequent labelled class: class c of C has
            :math:`n_c = \lfloor n_1 \gamma^{-c / (C - 1)} \rfloor` samples, at least 1, where :math:`n_1` is
            ``labels_per_class``; ``num_labels`` remains the total. Negative: the last class is the most frequent.
            Validation and test sets stay as they are.
        unlabeled_imbalance: the same for the unlabelled samples, of which as many are used as the ratio allows; the
            labelled ones that ``include_labeled`` adds do not count, and what the source brings without labels stays
            out. By default all are used, as the source has them.
        balance_labels: repeat the labelled samples of rare classes until every class has as many.
        batch_size: labelled samples per process and step, B.
        unlabeled_ratio: μ, unlabelled samples per labelled one.
        include_labeled: labelled samples are also among the unlabelled ones, without their labels.
        strong: the strong view; by default RandAugment and cutout, restricted for digits.
        pseudo_labels: labels for the unlabelled samples that an earlier run wrote: ``pseudo_labels.safetensors`` of a
            ``PseudoLabeler``, or the predictions of ``zoo predict`` for training samples (``WeakLabelData``). They hold
            until a ``PseudoLabeler`` gives others.
        **kwargs: see :class:`~datamodules.base.Data`.
    """

    def __init__(
        self,
        source: Source,
        labels_per_class: int | None = None,
        num_labels: int | None = None,
        labeled_fraction: float | None = None,
        imbalance: float | None = None,
        unlabeled_imbalance: float | None = None,
        balance_labels: bool = False,
        batch_size: int = 16,
        unlabeled_ratio: int = 7,
        include_labeled: bool = True,
        strong: View | None = None,
        pseudo_labels: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(source, batch_size, **kwargs)
        if unlabeled_ratio < 1:
            raise UserError(f"SemiSupervisedData: unlabeled_ratio={unlabeled_ratio} must be at least 1")
        self.labels_per_class = labels_per_class
        self.num_labels = num_labels
        self.labeled_fraction = labeled_fraction
        self.imbalance = imbalance
        self.unlabeled_imbalance = unlabeled_imbalance
        self.balance_labels = balance_labels
        self.unlabeled_ratio = unlabeled_ratio
        self.include_labeled = include_labeled
        self.strong = strong
        self.pseudo_labels = pseudo_labels

    @property
    def pseudo_label_role(self) -> str:
        """``unlabeled``."""
        return "unlabeled"

    def make_split(self, labels: Tensor) -> Split:
        """Validation first, labels from the rest; everything but validation is unlabelled."""
        rest, val = self.hold_out(labels)
        labeled = self.choose_labeled(
            labels, rest, self.labels_per_class, self.num_labels, self.labeled_fraction, self.imbalance
        )
        unlabeled = rest[~torch.isin(rest, labeled)]
        if self.unlabeled_imbalance is not None:
            unlabeled = self._long_tailed(labels, unlabeled, self.unlabeled_imbalance)
        if self.include_labeled:
            unlabeled = torch.cat([unlabeled, labeled]).sort().values
        parts = {"labeled": labeled, "unlabeled": unlabeled, "val": val}
        return Split(parts, len(labels), self.seed, self.source.name)

    def _long_tailed(self, labels: Tensor, among: Tensor, imbalance: float) -> Tensor:
        """The largest long-tailed part of these samples, sorted."""
        pool = labels[among]
        wanted = long_tailed(counts(pool, self.num_classes, self._owner), imbalance, self._owner)
        return among[stratified(pool, wanted, generator(self.seed, UNLABELED))]

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs, and take up the views of the method that is to be trained now."""
        super().setup(stage)
        if stage in (None, "fit"):
            self._roles["labeled"].views = self.views_of("labeled", ("image",), self.strong, self.source)
            self._roles["unlabeled"].views = self.views_of("unlabeled", ("weak", "strong"), self.strong, self.source)
            if self.pseudo_labels is not None and self._labels is None:
                self.set_pseudo_labels(*read_pseudo_labels(self.pseudo_labels, self.num_classes))

    def make_roles(self) -> dict[str, Role]:
        """Two roles: ``labeled`` and ``unlabeled``."""
        train = self._train(self.source)
        unlabeled: Samples = train.subset(self.parts["unlabeled"])
        labeled = self.parts["labeled"]
        if self.balance_labels:
            labeled = balanced(train.labels, labeled)
        extra = self.source.unlabeled() if self.unlabeled_imbalance is None else None
        if extra is not None and len(extra):
            unlabeled = join(unlabeled, extra, offset=len(train))
        return {
            "labeled": Role(train.subset(labeled), self.batch_size, {}),
            "unlabeled": Role(
                unlabeled,
                self.batch_size * self.unlabeled_ratio,
                {},
                hidden=True,
            ),
        }


def join(first: Samples, second: Samples, offset: int) -> Samples:
    """Two sets as one; the second's stable numbers start at ``offset``.

    Raises:
        TypeError: when one is in memory and the other is not.
    """
    labels, ids = torch.cat([first.labels, second.labels]), torch.cat([first.ids, second.ids + offset])
    columns = {key: torch.cat([first.columns[key], second.columns[key]]) for key in first.columns}
    if isinstance(first, TensorSamples) and isinstance(second, TensorSamples):
        return TensorSamples(torch.cat([first.images, second.images]), labels, ids, columns)
    if isinstance(first, TokenSamples) and isinstance(second, TokenSamples):
        return TokenSamples(torch.cat([first.tokens, second.tokens]), labels, ids, columns)
    if isinstance(first, FileSamples) and isinstance(second, FileSamples):
        return FileSamples(first.paths + second.paths, labels, first.size, first.channels, ids, columns)
    raise TypeError(f"cannot join {type(first).__name__} and {type(second).__name__}")
