"""How fast a run is, and whether the data keeps up."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

_COUNTERS = ("images", "steps", "seconds", "waited")


class Throughput(Callback):
    r"""Images per second, the share of time spent waiting for data, and peak memory.

    An *image* is one row of an image-like tensor (4 dimensions, floating or uint8) in the batch: ``labeled.image``,
    ``unlabeled.weak`` and ``unlabeled.strong`` count once each, since each is computed upon; a tokenised text counts as
    one row of ids. Masks and labels do not count. With :math:`n` images on this rank in :math:`t` seconds of
    training (validations, checkpoints at the end of an epoch and the first ``warmup_steps`` of every start left out)
    and :math:`R` ranks,

    .. math:: \text{images/s} = n / t, \quad \text{total} = \sum_r n_r / t_r, \quad
        \text{data wait} = t_\text{between} / t

    where :math:`t_\text{between}` passes on the host between the end of a step and the next batch lying on the device
    with its views made. Where the device is the slower
    part it is near 0; where it is large, the device starves.

    Nothing synchronises with the device per step: the host's clock over many steps is right because the device's queue
    is bounded, and the end of an epoch waits for the device. Values are logged as ``throughput/…`` at the trainer's
    logging steps and stand in :attr:`summary` after the run. Counters are kept in checkpoints.

    Lightning's ``ThroughputMonitor`` is not used: it synchronises the device at every step, assumes equal batches of
    equal ranks, needs a function that a YAML file cannot give, and knows nothing of waiting; ``DeviceStatsMonitor``
    logs a hundred allocator counters and no peak on the CPU.

    Args:
        warmup_steps: steps after every start that are not measured (compilation, first reads).

    Raises:
        ValueError: for a negative ``warmup_steps``.
    """

    def __init__(self, warmup_steps: int = 1) -> None:
        if warmup_steps < 0:
            raise ValueError(f"Throughput: warmup_steps={warmup_steps} must not be negative")
        self.warmup_steps = warmup_steps
        self.summary: dict[str, float] = {}
        self.totals: dict[str, float] = dict.fromkeys(_COUNTERS, 0.0)
        self._window = dict(self.totals)
        self._seen = 0
        self._ended: float | None = None  # when the last step ended; None while the clock is stopped
        self._began = 0.0
        self._between = 0.0

    # --- the clock ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start measuring anew; counters of a checkpoint are kept."""
        self._seen, self._window = 0, dict.fromkeys(_COUNTERS, 0.0)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first batch of an epoch is waited for, too."""
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        self._began = time.perf_counter()
        # After a validation, or a start in the middle of an epoch, the wait is unknown and the step counts alone.
        self._between = self._began - self._ended if self._ended is not None else 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step."""
        self._ended = time.perf_counter()
        self._seen += 1
        if self._seen > self.warmup_steps:
            window = self._window
            window["images"] += count_images(batch)
            window["steps"] += 1
            window["seconds"] += self._between + self._ended - self._began
            window["waited"] += self._between
        if trainer._logger_connector.should_update_logs and self._window["steps"]:
            self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._ended = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the device finish, so that its backlog is not forgotten, and log."""
        device = trainer.strategy.root_device
        if device.type == "cuda" and self._window["steps"] and self._ended is not None:
            torch.cuda.synchronize(device)
            self._window["seconds"] += time.perf_counter() - self._ended
        self._ended = None
        self._close_window()

    # --- results ------------------------------------------------------------------------------------------------------

    def _log(self, trainer: Trainer) -> None:
        """This rank's rates since the last log, in the logger's own step count."""
        rates = _rates(self._window)
        self._close_window()
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics({f"throughput/{name}": value for name, value in rates.items()}, step=step)

    def _close_window(self) -> None:
        for name in _COUNTERS:
            self.totals[name] += self._window[name]
            self._window[name] = 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up over the ranks. Peak memory is that of the hungriest rank."""
        from zoo.core.distributed import gather_across_ranks

        device = trainer.strategy.root_device
        own = _rates(self.totals)
        memory = _peak_memory(device)
        row = torch.tensor([[own["images_per_second"], own["data_wait"], memory]], dtype=torch.float32, device=device)
        rows = gather_across_ranks(row).cpu().double()
        self.summary = {
            "images_per_second": float(rows[:, 0].sum()),
            "images_per_second_per_rank": float(rows[:, 0].mean()),
            "data_wait": float(rows[:, 1].mean()),
            "steps_per_second": own["steps_per_second"],
            "peak_memory_mib": float(rows[:, 2].max()),
            "images": self.totals["images"],
            "steps": self.totals["steps"],
            "seconds": self.totals["seconds"],
        }

    def state_dict(self) -> dict[str, Any]:
        """The counters so far (of rank 0, as checkpoints are)."""
        return {name: self.totals[name] + self._window[name] for name in _COUNTERS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.totals = {name: float(state_dict[name]) for name in _COUNTERS}


def count_images(batch: Any) -> int:
    """Rows of the image-like tensors of a batch, each view counting; see :class:`Throughput`."""
    if isinstance(batch, Tensor):
        return _rows(batch)
    if isinstance(batch, dict):
        count = 0
        for name, value in batch.items():
            if name in ("attention_mask", "token_type_ids"):
                continue  # beside input_ids, which counts
            if isinstance(value, Tensor):
                count += value.shape[0] if name == "input_ids" else _rows(value)
            else:
                count += count_images(value)
        return count
    if isinstance(batch, list | tuple):
        return sum(count_images(value) for value in batch)
    return 0


def _rows(tensor: Tensor) -> int:
    image = tensor.ndim == 4 and (tensor.is_floating_point() or tensor.dtype == torch.uint8)
    text = tensor.ndim == 2 and tensor.dtype == torch.int64  # token ids
    return tensor.shape[0] if image or text else 0


def _rates(counters: dict[str, float]) -> dict[str, float]:
    seconds = max(counters["seconds"], 1e-9)
    return {
        "images_per_second": counters["images"] / seconds,
        "steps_per_second": counters["steps"] / seconds,
        "data_wait": counters["waited"] / seconds,
    }


def _peak_memory(device: torch.device) -> float:
    """MiB: the allocator's peak on CUDA, else the process's peak resident set since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
