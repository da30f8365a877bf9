"""Sums, means and gathers across ranks that are no-ops in a single process."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_across_ranks(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, equal on every rank. No gradient flows through it."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def mean_across_ranks(x: Tensor) -> Tensor:
    """Mean of ``x`` over ranks, equal on every rank. No gradient flows through it."""
    return sum_across_ranks(x) / world_size() if world_size() > 1 else x


def gather_across_ranks(x: Tensor) -> Tensor:
    """Rows of every rank, in rank order: (N, ...) → (R·N, ...). Every rank must bring the same shape."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)
