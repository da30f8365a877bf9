"""Orders of samples: exact numbers of steps, disjoint over ranks, reproducible, resumable.

An epoch is ``steps`` optimizer steps everywhere, however large a set is and however many processes share it. Samplers
yield whole lists of indices (``batch_size=None``), so that a set in memory is indexed once per batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from zoo.core.errors import UserError

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers: neighbouring seeds, passes and ranks give unrelated streams.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014) after each number.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def _replicas(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_replicas is None:
        num_replicas = torch.distributed.get_world_size() if ready else 1
    if rank is None:
        rank = torch.distributed.get_rank() if ready else 0
    return num_replicas, rank


class Draw(list[int]):
    """The indices of one batch, with the seed of whatever is random about it.

    Workers make views from this seed, so that a batch is the same however many workers there are and after a resume.
    """

    seed: int = 0


class RepeatSampler(DistributedSampler):  # Lightning leaves subclasses of DistributedSampler alone and calls set_epoch
    r"""Exactly ``steps`` batches per process and epoch, from an endless chain of permutations.

    Pass :math:`p` through the set is a permutation seeded by ``(seed, p)``; the chain of passes goes on across
    epochs. Step :math:`t` (counted over all epochs) takes the positions :math:`[t B W, (t+1) B W)` of the chain,
    process :math:`r` of :math:`W` the :math:`r`-th block of :math:`B`. Within a pass no two processes see the same
    sample, and every sample is seen before any is repeated. A set smaller than a batch is passed through several
    times within it.

    Args:
        dataset: the set, or its number of samples.
        batch_size: samples per process and step.
        steps: batches per process and epoch.
        seed: start of the chain.
        num_replicas: number of processes; found out if not given.
        rank: number of this process; found out if not given.

    Raises:
        ValueError: when the set is empty, or ``batch_size`` or ``steps`` is less than one.
    """

    def __init__(
        self,
        dataset: Sized | int,
        batch_size: int,
        steps: int,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        size = dataset if isinstance(dataset, int) else len(dataset)
        if size < 1:
            raise UserError("RepeatSampler: the set is empty, there is nothing to draw from")
        if batch_size < 1 or steps < 1:
            raise UserError(f"RepeatSampler: batch_size={batch_size} and steps={steps} must be at least 1")
        num_replicas, rank = _replicas(num_replicas, rank)
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        self.steps = steps
        self._pass = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        return self.batches(0)

    def batches(self, start: int) -> Iterator[Draw]:
        """The batches of the current epoch from number ``start`` on."""
        epoch = self.epoch
        for step in range(start, self.steps):
            step += epoch * self.steps
            draw = Draw(self._take((step * self.num_replicas + self.rank) * self.batch_size, self.batch_size))
            draw.seed = mix(self.seed, step, self.rank)
            yield draw

    def _take(self, position: int, count: int) -> list[int]:
        taken: list[int] = []
        while count > 0:
            number, offset = divmod(position, self.size)
            if number != self._pass:
                generator = torch.Generator().manual_seed(mix(self.seed, number))
                self._permutation, self._pass = torch.randperm(self.size, generator=generator), number
            part = self._permutation[offset : offset + count].tolist()
            taken += part
            position, count = position + len(part), count - len(part)
        return taken


class DomainSampler(RepeatSampler):
    """As many samples of every domain in every batch, each domain in its own endless chain of permutations.

    A domain smaller than the others is passed through more often. Within a batch one domain follows the other.

    Args:
        domains: (N,) the domain of each sample.
        batch_size: samples per process and step, a multiple of the number of domains.
        steps: batches per process and epoch.
        seed: start of the chains.
        num_replicas: number of processes; found out if not given.
        rank: number of this process; found out if not given.

    Raises:
        ValueError: when the set is empty, or ``batch_size`` is no multiple of the number of domains.
    """

    def __init__(
        self,
        domains: Tensor,
        batch_size: int,
        steps: int,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(len(domains), batch_size, steps, seed, num_replicas, rank)
        self.rows = [(domains == domain).nonzero().flatten() for domain in domains.unique().tolist()]
        if batch_size % len(self.rows):
            raise UserError(f"DomainSampler: batch_size={batch_size} must be a multiple of {len(self.rows)} domains")
        share = batch_size // len(self.rows)
        self.chains = [
            RepeatSampler(len(rows), share, steps, mix(seed, number), self.num_replicas, self.rank)
            for number, rows in enumerate(self.rows)
        ]

    def batches(self, start: int) -> Iterator[Draw]:
        """The batches of the current epoch from number ``start`` on."""
        for chain in self.chains:
            chain.set_epoch(self.epoch)
        for step, draws in enumerate(zip(*(chain.batches(start) for chain in self.chains), strict=True), start):
            taken = [rows[torch.tensor(draw)] for rows, draw in zip(self.rows, draws, strict=True)]
            draw = Draw(torch.cat(taken).tolist())
            draw.seed = mix(self.seed, step + self.epoch * self.steps, self.rank)
            yield draw


class EvalSampler(DistributedSampler):
    """Every sample exactly once, in order, shared out over the processes.

    All processes get equally many batches (collectives inside a model would hang otherwise), whose sizes differ by at
    most one sample; nothing is repeated to fill them up, so metrics of several processes equal those of one.

    Args:
        dataset: the set, or its number of samples.
        batch_size: largest number of samples in a batch.
        num_replicas: number of processes; found out if not given.
        rank: number of this process; found out if not given.

    Raises:
        ValueError: when there are fewer samples than processes, or ``batch_size`` is less than one.
    """

    def __init__(
        self, dataset: Sized | int, batch_size: int, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        size = dataset if isinstance(dataset, int) else len(dataset)
        num_replicas, rank = _replicas(num_replicas, rank)
        if size < num_replicas:
            raise UserError(f"EvalSampler: {size} samples cannot be shared out over {num_replicas} processes")
        if batch_size < 1:
            raise UserError(f"EvalSampler: batch_size={batch_size} must be at least 1")
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        largest = -(-size // num_replicas)
        # never more batches than the smallest share has samples: no process may get an empty one
        self.steps = min(-(-largest // batch_size), size // num_replicas)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        return self.batches(0)

    def batches(self, start: int) -> Iterator[Draw]:
        """The batches from number ``start`` on."""
        share = torch.arange(self.rank, self.size, self.num_replicas)
        for chunk in share.tensor_split(self.steps)[start:]:
            yield Draw(chunk.tolist())


class _Remaining(Sampler[Draw]):
    """What is left of a sampler's epoch, for the workers' DataLoader."""

    def __init__(self, sampler: RepeatSampler | EvalSampler) -> None:
        self.sampler = sampler
        self.start = 0

    def __len__(self) -> int:
        return len(self.sampler) - self.start

    def __iter__(self) -> Iterator[Draw]:
        return self.sampler.batches(self.start)


class Loader:
    """Batches of a set in a sampler's order, which a checkpoint can resume in the middle of an epoch.

    Deliberately not a ``DataLoader``: Lightning then neither replaces the sampler nor counts workers, but honours
    ``sampler.set_epoch`` and ``state_dict``. Iteration starts at the first ``next``, after ``set_epoch``.

    Args:
        dataset: maps a list of indices to a dict of tensors.
        sampler: gives the lists.
        num_workers: 0 reads in this process, which is by far the fastest for sets in memory.
        pin_memory: copy into page-locked memory (with workers only).
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: RepeatSampler | EvalSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_sampler = None  # Lightning looks for it
        self.sampler = sampler
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._position = 0
        self._epoch = 0
        self._resume: dict[str, int] | None = None
        self._workers: DataLoader | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start, self._epoch = 0, self.sampler.epoch
        # a state from the end of an earlier epoch says nothing about this one
        if self._resume is not None and self._resume["epoch"] == self._epoch:
            start = self._resume["position"]
        self._resume, self._position = None, start
        batches = iter(self._batches(start))
        while (batch := _next(batches)) is not None:
            self._position += 1  # before the yield: while the batch trains, it counts as taken
            yield batch

    def _batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        if self.num_workers == 0:
            return (self.dataset[draw] for draw in self.sampler.batches(start))
        if self._workers is None:
            self._workers = DataLoader(
                self.dataset,
                batch_size=None,
                sampler=_Remaining(self.sampler),
                num_workers=self.num_workers,
                persistent_workers=True,
                pin_memory=self.pin_memory and torch.cuda.is_available(),
            )
        self._workers.sampler.start = start  # type: ignore[attr-defined]
        return iter(self._workers)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches taken: equal on all ranks, so that rank 0 may speak for all."""
        if self._resume is not None:  # saved before the first batch after a resume
            return dict(self._resume)
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the last batch taken, if the next epoch asked for is that of the state."""
        self._resume = {"epoch": int(state_dict["epoch"]), "position": int(state_dict["position"])}


def _next(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """The next batch or None; a worker's error without the worker's traceback, which it carries as text."""
    try:
        return next(batches, None)
    except UserError as error:
        text = str(error).strip()
        raise UserError(text.rpartition("Error: ")[2] or text) from None
