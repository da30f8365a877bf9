"""Texts as the candidates of problems, and labelling functions as their verifiers."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.labeling.base import LabelingFunction, votes_of
from datamodules.sources.base import Samples
from datamodules.sources.candidates import CandidateSamples, CandidateSource
from datamodules.sources.text import TextSource
from zoo.core.errors import UserError


class TextCandidates(CandidateSource):
    r"""A source's texts in groups of K, in their order: which of a group belongs to class 1 is to be found.

    Every labelling function is a verifier: a vote for class 1 is a score of 1, another vote 0, abstaining no score.
    Text :math:`iK + k` is candidate k of problem i, so what ``zoo predict`` says of candidates are weak labels of the
    source's training texts: a verifier that reads the texts themselves learns from them as any student does, with
    :class:`~datamodules.WeakLabelData`, and :class:`~callbacks.SelectionEvaluation` says how well it chooses.

    Of the training texts those that are left over make a last problem, whose other candidates have neither score nor
    label; of the test texts they are left out.

    Args:
        source: texts of two classes, wrong and right.
        functions: that read texts and learn nothing, see :mod:`datamodules.labeling`.
        candidates: K, at least 2.

    Raises:
        UserError: for another number of classes or candidates, and functions that learn or read something else.
    """

    def __init__(self, source: TextSource, functions: list[LabelingFunction], candidates: int = 8) -> None:
        if candidates < 2:
            raise UserError(f"TextCandidates: candidates={candidates} must be at least 2")
        if not functions:
            raise UserError("TextCandidates: functions is empty; at least one must score")
        for function in functions:
            if function.automatic or function.needs != ("texts",):
                reads = "learns from labels" if function.automatic else f"reads {', '.join(function.needs)}"
                raise UserError(f"TextCandidates: {function.name} {reads}; a verifier here reads texts alone")
        self.source, self.functions, self.candidates = source, functions, candidates

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of wrong and right."""
        return tuple(self.source.classes)

    @property
    def verifier_names(self) -> list[str]:
        """Names of the functions."""
        return [name for function in self.functions for name in function.names]

    def prepare(self) -> None:
        """Prepare the source and the functions."""
        self.source.prepare()
        if self.source.num_classes != 2:
            raise UserError(
                f"TextCandidates: {self.source.name} has {self.source.num_classes} classes, not wrong and right"
            )
        for function in self.functions:
            function.prepare(self.source)

    def train(self) -> CandidateSamples:
        """Problems of the training texts."""
        return self._grouped("train", self.source.train(), leave_out=False)

    def test(self) -> CandidateSamples:
        """Problems of the test texts."""
        return self._grouped("test", self.source.test(), leave_out=True)

    def _grouped(self, part: str, samples: Samples, leave_out: bool) -> CandidateSamples:
        texts = self.source.read()[part][0]
        if len(texts) != len(samples) or not torch.equal(samples.ids, torch.arange(len(texts))):
            raise UserError(f"TextCandidates: {self.source.name} numbers its samples unlike its texts")
        columns = {"texts": texts, "index": samples.ids}
        votes = torch.cat([votes_of(function, columns, 2) for function in self.functions], dim=1)
        scores = torch.where(votes < 0, torch.nan, votes.float())
        return CandidateSamples(
            _in_groups(scores, self.candidates, torch.nan, leave_out),
            _in_groups(samples.labels, self.candidates, -1, leave_out),
        )


def _in_groups(rows: Tensor, size: int, fill: float, leave_out: bool) -> Tensor:
    """(N, ...) to (N / size, size, ...), without what is left over, or with it and filled up."""
    over = len(rows) % size
    if over and leave_out:
        rows = rows[: len(rows) - over]
    elif over:
        rows = torch.cat([rows, rows.new_full((size - over, *rows.shape[1:]), fill)])
    return rows.unflatten(0, (-1, size))
