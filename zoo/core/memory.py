"""Features of earlier steps, kept with what belongs to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.distributed import gather_across_ranks
from zoo.core.errors import UserError


class MemoryBank(nn.Module):
    r"""A fixed number of rows: a feature vector each, and further columns; equal on all ranks.

    :meth:`update` writes the rows of all ranks in rank order behind the last ones and wraps around, so that the oldest
    are overwritten; :meth:`put` writes them where it is told, for one slot per sample. Rows move in training mode only.
    All of it is buffers: a checkpoint restores it, its number of rows included.

    ``MemoryBank(2560, 64, probabilities=torch.zeros(10), label=torch.tensor(-1))`` has the columns ``probabilities``
    (2560, 10) and ``label`` (2560,), read as attributes or by ``bank.column(name)``.

    Args:
        size: number of rows K ≥ 0.
        dim: length of a feature vector, D ≥ 1.
        **empty: by column, what an empty row holds: it gives the column's shape and type.

    Raises:
        UserError: if a number is out of its range, or a column's name is taken.
    """

    features: Tensor
    filled: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int, **empty: Tensor) -> None:
        super().__init__()
        if size < 0 or dim < 1:
            raise UserError(f"MemoryBank: size={size} must be at least 0 and dim={dim} at least 1")
        self.columns = tuple(empty)
        self.register_buffer("features", torch.zeros(size, dim))
        self.register_buffer("filled", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))
        for name, value in empty.items():
            if hasattr(self, name):
                raise UserError(f"MemoryBank: a column cannot be called {name!r}; choose another name")
            self.register_buffer(name, value.expand(size, *value.shape).clone())

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.features)

    @property
    def full(self) -> Tensor:
        """Whether every row has been written, as a boolean scalar on the device."""
        return self.filled.all()

    def column(self, name: str) -> Tensor:
        """A column (K, ...) by its name."""
        return getattr(self, name)

    def update(self, features: Tensor, **columns: Tensor) -> None:
        """Write rows behind the last ones: features (N, D), and every column (N, ...).

        Every rank brings as many. Of more rows than there is room for, the last are kept.
        """
        if not self.training:
            return
        given = self._gather(features, columns)
        count = len(given["features"])
        last = {name: rows[-self.size :] for name, rows in given.items()} if self.size else given
        kept = min(count, self.size)
        where = self.position + torch.arange(count - kept, count, device=self.position.device)
        # New tensors, not updates in place: DDP may still hold the old ones for its buffer broadcast.
        if self.size:
            self._write(where % self.size, last)
            self.position = (self.position + count) % self.size

    def put(self, slots: Tensor, features: Tensor, **columns: Tensor) -> None:
        """Write rows to the slots (N,) in [0, K); where a slot is named twice, the last row named stays."""
        if not self.training:
            return
        given = self._gather(features, columns)
        slots = gather_across_ranks(slots)
        rows = torch.arange(len(slots), device=slots.device)
        last = rows.new_zeros(self.size).scatter_reduce(0, slots, rows, "amax")  # the order of writes is not defined
        self._write(slots, {name: values[last[slots]] for name, values in given.items()})

    def _gather(self, features: Tensor, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        if columns.keys() != set(self.columns):
            raise UserError(f"MemoryBank: columns {sorted(columns)} must be {sorted(self.columns)}")
        given = {"features": features, **columns}
        return {name: gather_across_ranks(rows.detach().to(getattr(self, name).dtype)) for name, rows in given.items()}

    def _write(self, where: Tensor, rows: dict[str, Tensor]) -> None:
        for name, values in rows.items():
            setattr(self, name, getattr(self, name).index_copy(0, where, values))
        self.filled = self.filled.index_fill(0, where, True)

    @property
    def sized_by_data(self) -> tuple[str, ...]:
        """The buffers of which a checkpoint may have another number of rows."""
        return ("features", "filled", *self.columns)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take as many rows as the checkpoint has: the data may not be known where it is read."""
        for name in self.sized_by_data:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape[1:] == own.shape[1:] and len(saved) != len(own):
                setattr(self, name, own.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
