"""A step that can be asked in parts."""

from typing import Any

from torch import Tensor

from zoo.core.method import Method

Batch = dict[str, dict[str, Tensor]]


class InParts(Method):
    """Base of methods in which a teacher, such as the average of the weights, says what the student is to learn.

    The step is cut in parts, so that a strategy such as :class:`~zoo.semi_supervised.fst.FST` can ask each by itself:
    what the student says, what the teacher asks of it, and what is to be learned from the two.
    """

    def student(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the student makes of the batch, with a gradient."""
        raise NotImplementedError

    def targets(self, batch: Batch, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What the teacher asks of it, without a gradient: targets (B,) or (B, C), and their weights (B,)."""
        raise NotImplementedError

    def losses(self, batch: Batch, outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The loss terms by name, among them those that depend on the targets."""
        raise NotImplementedError

    def show(self, batch: Batch, targets: tuple[Tensor, Tensor]) -> Any:
        """Look at a step's targets; nothing flows back. Logs the share of samples in use."""
        self.observe(utilization=targets[1].mean())

    def learn(self, batch: Batch, outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a step: the targets are shown, the terms summed and logged."""
        self.show(batch, targets)
        return self.report(**self.losses(batch, outputs, targets))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The student learns what the teacher says."""
        outputs = self.student(batch)
        return self.learn(batch, outputs, self.targets(batch, outputs))
