"""Some classes of a source as if there were no others, which come back as unknown ones in the test."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.sources.base import Samples, Source
from datamodules.sources.wrapped import WrappedSource, relabeled
from zoo.core.errors import UserError, suggest


class KnownClasses(WrappedSource):
    """A source of which only some classes are known; the others are there to be rejected.

    Training and test samples are those of the known classes, renumbered in the order given. :meth:`unknown` offers the
    test samples of all other classes, for an :class:`~callbacks.OpenSetEvaluation`. What the source brings without
    labels stays as it is.

    Args:
        source: where samples come from.
        known: class numbers, or class names, of at least one class and not of all.

    Raises:
        UserError: for a class that occurs twice; and, when the classes are asked for, for one that the source has not,
            or where no class is left unknown.
    """

    def __init__(self, source: Source, known: list[int | str]) -> None:
        if not known or len(set(map(str, known))) < len(known):
            raise UserError(f"KnownClasses: known={known} must name at least one class, and each once")
        super().__init__(source)
        self.known = known

    @property
    def name(self) -> str:
        """The source's name with the known classes."""
        return f"{self.source.name}[{', '.join(map(str, self.known))}]"

    @property
    def numbers(self) -> list[int]:
        """The known classes' numbers in the source."""
        names = list(self.source.classes)
        numbers = []
        for known in self.known:
            if isinstance(known, int) and 0 <= known < len(names):
                numbers.append(known)
            elif known in names:
                numbers.append(names.index(str(known)))
            else:
                hint = suggest(str(known), names)
                raise UserError(f"KnownClasses: {self.source.name} has no class {known!r}.{hint}")
        if len(set(numbers)) < len(numbers):
            raise UserError(f"KnownClasses: known={self.known} names a class twice")
        if len(numbers) == len(names):
            raise UserError(f"KnownClasses: known={self.known} are all classes of {self.source.name}: none is unknown")
        return numbers

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the known classes, in the order given."""
        names = self.source.classes
        return tuple(names[number] for number in self.numbers)

    def train(self) -> Samples:
        """The training samples of the known classes, and those whose class is unknown to the source itself."""
        return self._part(self.source.train())

    def test(self) -> Samples:
        """The test samples of the known classes."""
        return self._part(self.source.test())

    def unlabeled(self) -> Samples | None:
        """What the source brings without labels; a truth that it knows is renumbered, too."""
        samples = self.source.unlabeled()
        return None if samples is None else relabeled(samples, self._renumbered(samples.labels))

    def unknown(self) -> Samples:
        """The test samples of all other classes, labelled -1."""
        samples = self.source.test()
        labels = self._renumbered(samples.labels)
        return _relabel(samples, ((labels < 0) & (samples.labels >= 0)).nonzero().flatten(), labels)

    def _part(self, samples: Samples) -> Samples:
        labels = self._renumbered(samples.labels)
        return _relabel(samples, ((labels >= 0) | (samples.labels < 0)).nonzero().flatten(), labels)

    def _renumbered(self, labels: Tensor) -> Tensor:
        """Labels (N,) among the known classes, -1 for the others."""
        numbers = torch.full((len(self.source.classes) + 1,), -1)
        numbers[self.numbers] = torch.arange(len(self.known))
        return numbers[labels]  # -1 reads the last entry, which stays -1


def _relabel(samples: Samples, where: Tensor, labels: Tensor) -> Samples:
    chosen = samples.subset(where)
    chosen.labels, chosen.ids = labels[where], torch.arange(len(where))
    return chosen
