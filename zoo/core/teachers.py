"""Networks that teach: an exponential moving average of the student, or a frozen copy of another model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from zoo.core.errors import UserError


def has_weights(recipe: Callable[[int], nn.Module]) -> bool:
    """Whether a recipe names weights; one that cannot be read, such as a function, is taken at its word."""
    arguments = getattr(recipe, "keywords", None)
    return True if not isinstance(arguments, dict) else arguments.get("weights") is not None


class Frozen(nn.Module):
    """A network that never learns: evaluation mode pinned, no gradients, forward without a graph.

    Args:
        module: the network; it is taken, not copied, so nothing else may train it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever is asked: batch statistics of a teacher must not move."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own forward, without gradients."""
        return self.module(*args, **kwargs)


class EMA(Frozen):
    r"""The exponential moving average of a student.

    .. math:: \phi \leftarrow m\, \phi + (1 - m)\, \theta

    A registered sub-module with its own storage, so that checkpoints, devices, sharding and plain ``ddp`` see it.
    Parameters are averaged, buffers are copied (averaging a counter or a BatchNorm variance is wrong). It does not move
    itself: :class:`callbacks.EMATeacher` calls :meth:`update` once after every optimizer step.

    Args:
        module: the student to copy.
        momentum: :math:`m` in [0, 1]; 0 is the student itself, 1 never moves.
        warmup: use :math:`\min(m, (1 + t) / (10 + t))` at update :math:`t`, so that an early average forgets the random
            start.

    Raises:
        UserError: if ``momentum`` is outside [0, 1].

    Source: Tarvainen and Valpola 2017, arXiv 1703.01780.
    """

    updates: Tensor

    def __init__(self, module: nn.Module, momentum: float = 0.999, warmup: bool = False) -> None:
        if not 0.0 <= momentum <= 1.0:
            raise UserError(f"EMA: momentum={momentum} must lie in [0, 1]")
        super().__init__(copy.deepcopy(module))
        self.momentum = momentum
        self.warmup = warmup
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self._count: int | None = None  # `updates` on the host, so that warm-up needs no synchronisation
        self._tensors: tuple[int, tuple[list[Any], ...]] | None = None

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move one step towards ``student``, which must have the layout of the copied module."""
        theirs, buffers, ours, our_buffers = self._pairs(student)
        torch._foreach_lerp_(ours, theirs, 1.0 - self._momentum_now())
        if buffers:
            torch._foreach_copy_(our_buffers, buffers)
        self._count = (self._count or 0) + 1
        self.updates += 1

    @torch.no_grad()
    def approach(self, parameters: Sequence[Tensor]) -> None:
        """Move one step towards ``parameters``, in the order of the module's own, such as those of a student to come.

        Only the weights move: buffers stay, and the step is not counted.
        """
        torch._foreach_lerp_(list(self.module.parameters()), list(parameters), 1.0 - self._momentum_now())

    def _momentum_now(self) -> float:
        if self._count is None:
            self._count = int(self.updates)
        return min(self.momentum, (1 + self._count) / (10 + self._count)) if self.warmup else self.momentum

    def _pairs(self, student: nn.Module) -> tuple[list[Any], ...]:
        """Matching tensors of both sides; collecting them anew at every step would cost more than the update."""
        if self._tensors is None or self._tensors[0] != id(student):
            tensors = (student.parameters(), student.buffers(), self.module.parameters(), self.module.buffers())
            self._tensors = id(student), tuple(map(list, tensors))
        return self._tensors[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # moved or cast: the collected tensors are stale
        self._tensors = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._count, self._tensors = None, None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": None}
