"""Training data that a model is fitted to in one pass."""

from __future__ import annotations

from typing import Any

from datamodules.base import Data, Role
from datamodules.samplers import EvalSampler, RepeatSampler
from datamodules.sources.base import Source
from zoo.core.errors import UserError


class EachOnce(Data):
    """What is not seen through views and not repeated: every sample once in an epoch, handed over as it is.

    Args:
        source: where samples come from.
        batch_size: samples per process and step.
        steps: of an epoch; by default as many as it takes to hand over every sample exactly once.
        **kwargs: see :class:`~datamodules.base.Data`.
    """

    def __init__(self, source: Source, batch_size: int, steps: int | None = None, **kwargs: Any) -> None:
        super().__init__(source, batch_size, 1 if steps is None else steps, **kwargs)
        self.each_once = steps is None

    def make_sampler(self, number: int, role: Role) -> RepeatSampler:
        """Every sample exactly once in an epoch, unless a number of steps was asked for."""
        if self.each_once:
            return EvalSampler(role.samples, self.batch_size, **self._replicas())  # type: ignore[return-value]
        return super().make_sampler(number, role)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """No views, so no seeds of views; evaluation batches have none and are flat."""
        return {name: _without_seed(of) if isinstance(of, dict) else of for name, of in batch.items()}

    def _check_batch(self, name: str, role: Role) -> None:
        if not self.each_once:
            super()._check_batch(name, role)
        elif len(role.samples) == 0:
            raise UserError(f"{self._owner}: no samples are left for the role {name!r}")


def _without_seed(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "seed"}
