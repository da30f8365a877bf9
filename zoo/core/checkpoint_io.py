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

DEFAULT_MONITORS = ("validator/information_maximization", "val/accuracy", "val/miou")


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
        temporary = target.with_name(f".{target.name}.tmp")  # one name: what a killed process left is written over
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
    validation simply has no ``best``. A run that ``max_steps`` or a timer stopped within an epoch goes on where it
    stopped.

    Args:
        dirpath: the folder; None is ``checkpoints`` in the run folder.
        monitor: the metrics to choose by: the first one that the validation logs. By default what the target looks
            like without its labels (``validator/information_maximization``), where a callback says so, else the
            accuracy or the mean intersection over union of ``val``. What is named ``oracle/…`` knows labels that a user
            would not have; it is chosen by only where it is named here.
        mode: ``"max"`` or ``"min"``.
        every_n_epochs: how often ``last`` and ``best`` are considered.
        every_n_steps: write ``last`` also within an epoch, every so many optimizer steps.

    Raises:
        UserError: for ``every_n_steps`` below 1.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | list[str] | None = None,
        mode: str = "max",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"RunCheckpoint: every_n_steps={every_n_steps} must be at least 1, or null")
        names = [monitor] if isinstance(monitor, str) else list(monitor or DEFAULT_MONITORS)
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
        self._scored_by: str | None = None  # what `best_model_score` is a value of
        self._every_n_train_steps = every_n_steps or 0  # Lightning's name, which NonFiniteGuard looks at

    @property
    def state_key(self) -> str:
        """One key whatever is monitored, so that a run resumes although its validation changed."""
        return "RunCheckpoint"

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.monitor = next((name for name in self.names if name in monitor_candidates), self.names[0])
        if self.monitor not in monitor_candidates:
            return
        if self._scored_by not in (None, self.monitor):  # values of two metrics say nothing of each other
            self.best_k_models, self.best_model_score, self.kth_best_model_path = {}, None, ""
        self._scored_by = self.monitor
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing, unless the validation measures something else now."""
        super().load_state_dict(state_dict)
        if state_dict.get("best_model_score") is not None:
            self._scored_by = state_dict.get("monitor")

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether this step is one of ``every_n_steps``."""
        return self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0

    def _save(self, trainer: Trainer) -> None:
        epoch_is_due = (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if self._should_skip_saving_checkpoint(trainer) or not (epoch_is_due or self._is_due(trainer)):
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within the epoch, if asked; after its last batch, the end of the epoch does."""
        if self._is_due(trainer) and not trainer.is_last_batch and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

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

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume behind the last batch, whatever stopped the run."""
        if loop := checkpoint.get("loops", {}).get("fit_loop"):
            reopen_epoch(loop, counted_in_steps=trainer.max_steps != -1)


def reopen_epoch(fit_loop: dict[str, Any], counted_in_steps: bool) -> None:
    """Correct what Lightning's fit loop recorded about an epoch, in place, before it is restored.

    A run that stops within an epoch counts that epoch as processed before its last checkpoint is written: resumed, it
    would leave out the rest. And a run with ``max_steps`` always restarts within the epoch that was recorded: it counts
    an epoch that was over once more, and draws the batches of the one after next. In both cases the epoch must read as
    begun and not processed; its batches say where to go on.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``.
        counted_in_steps: whether the trainer that resumes has ``max_steps``.
    """
    progress, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    now = progress["current"]
    if now["started"] == 0 or now["processed"] < now["started"]:
        return  # not begun, or saved within the epoch
    if batches["is_last_batch"] and not counted_in_steps:
        return  # over, and counted in epochs: Lightning goes on with the next one
    for counts in (now, progress["total"]):
        counts["processed"] = counts["completed"] = counts["started"] - 1
