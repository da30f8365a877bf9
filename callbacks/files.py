"""Where a run keeps its files, and writing them so that a reader never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def run_folder(trainer: Trainer) -> Path:
    """The logger's folder, or ``default_root_dir`` without one. Call it on every rank: rank 0 decides."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a neighbour of ``path`` and move what it wrote into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays at the end: some writers choose the format by it.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def gather_rows(x: Tensor, device: torch.device) -> Tensor:
    """Rows of every rank in rank order, on the CPU; ranks may hold different numbers of rows.

    Args:
        x: (N_r, ...), anywhere. Every rank must call this, also one without rows, with equal trailing dimensions.
        device: where the process group communicates.

    Returns:
        (sum of N_r, ...).
    """
    from zoo.core.distributed import gather_across_ranks, world_size

    if world_size() == 1:
        return x.cpu()
    counts = gather_across_ranks(torch.tensor([len(x)], device=device)).tolist()
    padded = x.new_zeros((max(counts), *x.shape[1:]), device=device)
    padded[: len(x)] = x.to(device)
    parts = gather_across_ranks(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).cpu()


def by_index(index: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Rows sorted by ``index`` (N,), each index once: samplers may repeat samples to fill the ranks up."""
    unique, inverse = index.unique(return_inverse=True)
    first = torch.empty_like(unique)
    # Written back to front, so that the first of several equal rows stays.
    first[inverse.flip(0)] = torch.arange(len(index) - 1, -1, -1)
    return unique, *(column[first] for column in columns)
