"""A source that changes something about another one."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from datamodules.sources.base import Samples, Source
from datamodules.transforms import View


class WrappedSource(Source):
    """Base of sources around another one: everything is the other's until a subclass says otherwise.

    Args:
        source: the other.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.modality, self.flip, self.streams = source.modality, source.flip, source.streams
        self.channels, self.size, self.mean, self.std = source.channels, source.size, source.mean, source.std

    @property
    def name(self) -> str:
        """The source's name, marked."""
        return f"{type(self).__name__}({self.source.name})"

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the source."""
        return self.source.classes

    @property
    def tokenizer(self) -> Any:
        """The source's, if it has texts; else None."""
        return getattr(self.source, "tokenizer", None)

    @property
    def corpus(self) -> Any:
        """What views of texts know of the source's words."""
        return self.source.corpus  # type: ignore[attr-defined]

    def prepare(self) -> None:
        """What the source checks or fetches."""
        self.source.prepare()

    def train(self) -> Samples:
        """The source's."""
        return self.source.train()

    def test(self) -> Samples:
        """The source's."""
        return self.source.test()

    def unlabeled(self) -> Samples | None:
        """The source's."""
        return self.source.unlabeled()

    def weak_view(self) -> View:
        """The source's."""
        return self.source.weak_view()

    def strong_view(self) -> View:
        """The source's."""
        return self.source.strong_view()


def relabeled(samples: Samples, labels: Tensor) -> Samples:
    """The same samples with other labels (N,)."""
    changed = copy.copy(samples)
    changed.labels = labels
    return changed
