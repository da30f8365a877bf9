"""Checkpoints that are whole or absent: a crash or a full disk never costs the previous one."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from zoo.core.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, flush to the disk, then rename over it.

    Lightning's own writer builds the whole file in memory first, as large as the model and its optimizer, and does not
    flush it to the disk. Here the previous checkpoint stays until the new one is complete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Args:
            checkpoint: what :func:`torch.save` takes.
            path: a local path; anything with ``://`` is left to Lightning.
            storage_options: must be None.

        Raises:
            UserError: when the disk refuses; ``path`` is then what it was before.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            # torch reports a full disk as RuntimeError while it unwinds the OSError that says so.
            cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
            if cause is None:
                raise
            kept = "the previous checkpoint is kept" if target.exists() else "nothing was written"
            raise UserError(f"cannot write {target}: {cause.strerror or cause}; {kept}") from error


class RunCheckpoint(ModelCheckpoint):
    """``checkpoints/last.ckpt`` after every epoch, ``best.ckpt`` where a validation improved.

    Unlike :class:`ModelCheckpoint`, ``last`` is written also when the epoch was not the best one, and a run without
    validation simply has no ``best``.

    Args:
        dirpath: the folder; None is ``checkpoints`` in the run folder.
        monitor: the metrics to choose by: the first one that the validation logs.
        mode: ``"max"`` or ``"min"``.
        every_n_epochs: how often ``last`` and ``best`` are considered.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | list[str] | None = None,
        mode: str = "max",
        every_n_epochs: int = 1,
    ) -> None:
        names = [monitor] if isinstance(monitor, str) else (monitor or ["val/accuracy", "val/miou"])
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=names[0],
            mode=mode,
            save_top_k=1,
            save_last=True,
            every_n_epochs=every_n_epochs,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self.names = names

    @property
    def state_key(self) -> str:
        """One key whatever is monitored, so that a run resumes although its validation changed."""
        return "RunCheckpoint"

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.monitor = next((name for name in self.names if name in monitor_candidates), self.names[0])
        if self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save(self, trainer: Trainer) -> None:
        if self._should_skip_saving_checkpoint(trainer) or (trainer.current_epoch + 1) % self._every_n_epochs:
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where the validation of this epoch, if there is one, is over."""
        if self._should_save_on_train_epoch_end(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation that runs within the epoch."""
        if not self._should_save_on_train_epoch_end(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the last state is kept, also when training stopped within an epoch."""
        if not getattr(trainer, "fast_dev_run", False) and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
