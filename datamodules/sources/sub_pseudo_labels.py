"""SPL: Sub-pseudo labels: where weak label and teacher disagree is a class of its own.

Cheng et al., AAAI 2022, https://arxiv.org/abs/2101.03713
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from datamodules.sources.base import MissingData, Samples, Source
from datamodules.sources.wrapped import WrappedSource, relabeled
from zoo.core.errors import UserError


def sub_pseudo_labels(
    weak: Tensor, teacher: Tensor, num_classes: int, keep: int | None = None, backup: bool = True
) -> tuple[Tensor, list[tuple[int, int]]]:
    r"""One class for every pair of weak label w and teacher's prediction t that occurs.

    The diagonal, on which both agree, is always kept. Of the other pairs the ``keep`` most frequent are classes of
    their own (D-SPL); the rest goes to one backup class per weak label (B-SPL), or is left without a label.

    Args:
        weak: w (N,) in 0..C-1.
        teacher: t (N,) in 0..C-1, -1 where there is none.
        num_classes: C.
        keep: pairs off the diagonal to keep; ``None`` keeps all.
        backup: whether the rest has backup classes.

    Returns:
        Labels (N,), -1 where there is none, and the pair (w, t) of every class, t = -1 for backup classes: first the
        diagonal, then the kept pairs, then the backups, without empty classes.
    """
    known = (weak >= 0) & (teacher >= 0)
    cells = weak.clamp_min(0) * num_classes + teacher.clamp_min(0)
    counts = torch.bincount(cells[known], minlength=num_classes**2)
    diagonal = torch.arange(num_classes) * (num_classes + 1)
    off = counts.clone()
    off[diagonal] = 0
    order = off.sort(descending=True, stable=True).indices
    chosen = order[: int((off > 0).sum()) if keep is None else min(keep, int((off > 0).sum()))]
    present = diagonal[counts[diagonal] > 0]
    kept = torch.cat([present, chosen.sort().values])
    number = torch.full((num_classes**2,), -1)
    number[kept] = torch.arange(len(kept))
    labels = torch.where(known, number[cells], -1)
    pairs = [divmod(cell, num_classes) for cell in kept.tolist()]
    left = known & (labels < 0)
    if backup and bool(left.any()):
        weak_left = weak[left].unique()
        place = torch.full((num_classes,), -1)
        place[weak_left] = torch.arange(len(weak_left)) + len(kept)
        labels = torch.where(left, place[weak.clamp_min(0)], labels)
        pairs += [(w, -1) for w in weak_left.tolist()]
    return labels, pairs


class SubPseudoLabels(WrappedSource):
    r"""A weakly labelled source in the space of sub-pseudo labels, to train a network before its real task.

    The training labels of ``source`` are weak (a keyword, a tag, a noisy annotation); a teacher that has seen a few
    clean labels has predicted the same samples. Training with cross-entropy on the pairs (w, t) uses both without
    believing either. Then the head is thrown away and the network fine-tuned on the clean labels
    (``weights: RUN``, ``weights_part: backbone``). In the test a sample of class c counts as the pair (c, c).

    The label space is a function of the source and the file alone, so that every run and every process has the same.

    Args:
        source: whose training labels are weak.
        teacher: its predictions: a file with ``index`` (N,) and ``probabilities`` (N, C), such as a ``PseudoLabeler``
            or ``zoo predict`` writes. Samples that it leaves out have no label.
        keep: pairs off the diagonal that are classes of their own; ``None`` for all, C × C at most.
        backup: whether the other pairs go to one backup class per weak label; otherwise they have no label.

    Raises:
        MissingData: when there is no such file.
        UserError: when the file does not fit the source.

    Source: Cheng et al. 2022, arXiv 2101.03713. Merging of pairs by the meaning of their names (S-SPL) is left out.
    """

    def __init__(self, source: Source, teacher: str, keep: int | None = None, backup: bool = True) -> None:
        if keep is not None and keep < 0:
            raise UserError(f"SubPseudoLabels: keep={keep} must be at least 0, or null for all")
        super().__init__(source)
        self.teacher, self.keep, self.backup = teacher, keep, backup
        self._space: tuple[Tensor, list[tuple[int, int]]] | None = None

    @property
    def name(self) -> str:
        """The source's name with the number of pairs kept."""
        return f"{self.source.name} as sub-pseudo labels"

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pair (w, t) of every class."""
        return self._divide()[1]

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """``w`` where both agree, ``w (t)`` where the teacher says t, ``w (other)`` for backup classes."""
        names = self.source.classes
        return tuple(names[w] if w == t else f"{names[w]} ({names[t] if t >= 0 else 'other'})" for w, t in self.pairs)

    def prepare(self) -> None:
        """What the source checks or fetches, and that the teacher's file is there."""
        super().prepare()
        if not Path(self.teacher).is_file():
            raise MissingData(
                f"SubPseudoLabels: teacher={self.teacher!r} ({Path(self.teacher).resolve()}) is no file. A run with a "
                "PseudoLabeler among its callbacks writes pseudo_labels.safetensors in its folder"
            )

    def _divide(self) -> tuple[Tensor, list[tuple[int, int]]]:
        if self._space is None:
            from datamodules.weak_labels import read_weak_labels  # the regimes import the sources

            self.prepare()
            samples = self.source.train()
            found = read_weak_labels(self.teacher, self.source.num_classes)
            rows = torch.full((int(max(found["index"].max(), samples.ids.max())) + 1,), -1)
            rows[found["index"]] = found["probabilities"].argmax(dim=1)
            teacher = rows[samples.ids]
            if not bool(((teacher >= 0) & (samples.labels >= 0)).any()):
                raise UserError(
                    f"SubPseudoLabels: teacher={self.teacher!r} has none of the samples of {self.source.name}"
                )
            self._space = sub_pseudo_labels(samples.labels, teacher, self.source.num_classes, self.keep, self.backup)
        return self._space

    def train(self) -> Samples:
        """The training samples, labelled with the number of their pair."""
        return relabeled(self.source.train(), self._divide()[0])

    def unlabeled(self) -> Samples | None:
        """What the source brings without labels, and without a pair."""
        samples = self.source.unlabeled()
        return None if samples is None else relabeled(samples, torch.full_like(samples.labels, -1))

    def test(self) -> Samples:
        """The test samples: class c is the pair (c, c), -1 where that does not occur in training."""
        samples = self.source.test()
        number = torch.full((self.source.num_classes + 1,), -1)
        for place, (w, t) in enumerate(self.pairs):
            if w == t:
                number[w] = place
        return relabeled(samples, number[samples.labels])
