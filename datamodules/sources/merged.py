"""A source with coarser classes: what is learnt of the finer ones shows in a test on the source itself."""

from __future__ import annotations

from torch import Tensor

from datamodules.sources.base import Samples, Source
from datamodules.sources.wrapped import WrappedSource, relabeled
from zoo.core.errors import UserError


class MergedClasses(WrappedSource):
    """A source whose classes are joined to groups.

    Samples keep their numbers, so that ``index`` still finds their finer class in the source. Features that were
    trained on groups can be probed for the classes with a :class:`~callbacks.LinearEvaluation` on the source itself.

    Args:
        source: where samples come from.
        groups: the source's class numbers, group by group; every class once.

    Raises:
        UserError: when a group is empty, or the classes of the groups are not those of the source, when first asked.
    """

    def __init__(self, source: Source, groups: list[list[int]]) -> None:
        members = [number for group in groups for number in group]
        if not all(groups) or sorted(members) != list(range(len(members))):
            raise UserError(f"MergedClasses: groups={groups} must hold the numbers from 0 on, each once, none empty")
        super().__init__(source)
        self.groups = groups

    @property
    def name(self) -> str:
        """The source's name with the number of groups."""
        return f"{self.source.name}/{len(self.groups)}"

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the groups: those of their classes."""
        names = self.source.classes
        if sum(map(len, self.groups)) != len(names):
            raise UserError(f"MergedClasses: groups={self.groups} must hold the {len(names)} classes of the source")
        return tuple(" or ".join(names[number] for number in group) for group in self.groups)

    def train(self) -> Samples:
        """The training samples, with the groups as labels."""
        return self._merged(self.source.train())

    def test(self) -> Samples:
        """The test samples, with the groups as labels."""
        return self._merged(self.source.test())

    def unlabeled(self) -> Samples | None:
        """What the source brings without labels, with groups where it knows the classes."""
        samples = self.source.unlabeled()
        return None if samples is None else self._merged(samples)

    def _merged(self, samples: Samples) -> Samples:
        return relabeled(samples, self.group_of(samples.labels))

    def group_of(self, labels: Tensor) -> Tensor:
        """Groups (N,) of classes (N,); -1 stays -1."""
        table = labels.new_full((len(self.source.classes) + 1,), -1)
        for number, group in enumerate(self.groups):
            table[group] = number
        return table[labels]  # -1 reads the last entry
