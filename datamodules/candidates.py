"""Verifiers score the candidates of a generator: every problem once in an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.base import VAL, Role
from datamodules.each_once import EachOnce
from datamodules.sources.base import Samples, Source
from datamodules.sources.candidates import CandidateSource
from datamodules.splits import Split, generator
from zoo.core.errors import UserError


class CandidateData(EachOnce):
    """Problems with candidates, every one of which is handed over once in an epoch.

    Batch: ``candidates`` {scores (B, K, V); index; hidden_label (B, K); answers (B, K) where there are any}.
    Evaluation: {scores, label (B, K), index, answers}; prediction goes through the training set.

    Args:
        source: a :class:`CandidateTable` or :class:`SimulatedCandidates`.
        batch_size: problems per process and step.
        steps: of an epoch; by default as many as it takes to hand over every problem exactly once.
        val_size: problems held out, a number or a share; none by default, as labels are not learnt from.
        **kwargs: see :class:`~datamodules.base.Data`.
    """

    def __init__(
        self, source: Source, batch_size: int = 64, steps: int | None = None, val_size: int | float = 0, **kwargs: Any
    ) -> None:
        super().__init__(source, batch_size, steps, val_size=val_size, **kwargs)
        if not isinstance(source, CandidateSource):
            raise UserError(f"CandidateData: source={source.name} has no scored candidates; take CandidateTable")

    @property
    def verifier_names(self) -> list[str] | None:
        """Of the V verifiers, where they have any."""
        return getattr(self.source, "verifier_names", None)

    @property
    def predicts(self) -> str:
        """The training set's numbers."""
        return "train"

    def make_split(self, labels: Tensor) -> Split:
        """Validation problems at random."""
        total = self.val_size if isinstance(self.val_size, int) else round(self.val_size * len(labels))
        if total >= len(labels):
            raise UserError(f"CandidateData: val_size={self.val_size} leaves nothing of {len(labels)} problems")
        order = torch.randperm(len(labels), generator=generator(self.seed, VAL))
        parts = {"train": order[total:].sort().values, "val": order[:total].sort().values}
        return Split(parts, len(labels), self.seed, self.source.name)

    def make_roles(self) -> dict[str, Role]:
        """One role: ``candidates``."""
        samples = self._train(self.source).subset(self.parts["train"])
        return {"candidates": Role(samples, self.batch_size, {}, hidden=True)}

    def prediction_set(self) -> Samples:
        """All training problems."""
        return self._train(self.source)

    def _check_labels(self) -> None:
        """Nothing is learnt from labels."""
