"""Stops a run whose loss is no longer a number, before it costs the last good checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from zoo.core.errors import UserError


class NonFiniteLoss(UserError, ArithmeticError):  # noqa: N818 (a state, named as users search for it)
    """The loss, a gradient or a weight is NaN or infinite.

    Attributes:
        step: ``global_step`` at the first bad batch of this rank, or of the first rank that had one.
        indices: samples of that batch by role, as lists of their stable index.
        checkpoint: the newest checkpoint that is still good, if any.
    """

    def __init__(self, message: str, step: int, indices: dict[str, list[int]], checkpoint: Path | None) -> None:
        super().__init__(message)
        self.step = step
        self.indices = indices
        self.checkpoint = checkpoint


class NonFiniteGuard(Callback):
    """Raises :class:`NonFiniteLoss` on all ranks together, with the step and the samples of the first bad batch.

    Looking at a loss on the host at every step would stall the device. So a step only keeps its loss where it is, and
    the host looks at them together every ``every_n_steps`` batches, before a validation, at the end of an epoch, and
    before any checkpoint. Before a checkpoint the trainable weights are checked too: a finite loss can have had a
    gradient that was not.

    Args:
        every_n_steps: read every N batches; None is the trainer's ``log_every_n_steps``.
        gradients: also watch the gradients' norm before each optimizer step. Not under 16-mixed precision, whose
            scaler meets overflows and skips them by design.

    Raises:
        ValueError: for ``every_n_steps`` below 1.
    """

    def __init__(self, every_n_steps: int | None = None, gradients: bool = False) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"NonFiniteGuard: every_n_steps={every_n_steps} must be at least 1, or None")
        self.every_n_steps = every_n_steps
        self.gradients = gradients
        self._noted: list[tuple[int, Tensor]] = []  # values since the last reading, with their batch's number
        self._number = -1  # of the batch in work, counted from the start of this process
        self._recent: dict[int, tuple[int, int, dict[str, Tensor]]] = {}  # by number, those since the last reading
        self._good: set[Path] = set()
        self._error: NonFiniteLoss | None = None
        self._watching, self._scaled = False, False
        self._every = every_n_steps or 50
        self._saves: list[int] = []  # after how many steps each checkpoint callback may save

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a clean flag."""
        self._noted = []
        self._recent, self._good, self._error, self._watching, self._number = {}, set(), None, True, -1
        self._scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        # Collected once: every callback at every step would cost more than the guard itself.
        self._every = self.every_n_steps or trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        self._saves = [every for callback in trainer.checkpoint_callbacks if (every := _saves_every(callback))]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which samples come, as tensors where they are."""
        self._number += 1
        self._recent[self._number] = (trainer.global_step, batch_idx, _indices(batch))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss for the next look."""
        self._note(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Watch the gradients, if asked."""
        if self.gradients and not self._scaled:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                self._note(torch.stack(torch._foreach_norm(gradients)).sum())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read when it is time, or when a checkpoint callback is about to save."""
        if self._saves and any(trainer.global_step % every == 0 for every in self._saves):
            self._read(trainer, pl_module)
        elif (self._number + 1) % self._every == 0:
            self._read(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read before a validation, whose end may save."""
        if self._watching and not trainer.sanity_checking:
            self._read(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read before the epoch's checkpoint: checkpoint callbacks come after all others."""
        self._read(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read before the last checkpoint."""
        self._read(trainer, pl_module)
        self._watching = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save a bad state, whoever asked for it."""
        if self._error is not None:
            raise self._error
        if self._watching:
            self._read(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the run's tensors go."""
        self._noted, self._recent, self._watching = [], {}, False

    def _note(self, value: Tensor) -> None:
        self._noted.append((self._number, value))  # looked at when the flag is read: a step costs nothing

    def _first_bad(self) -> int:
        """The number of the first step with a non-finite value since the last look, or -1."""
        noted, self._noted = self._noted, []
        if not noted:
            return -1
        finite = torch.stack([value.float().sum() for _, value in noted]).isfinite().tolist()
        return next((number for (number, _), good in zip(noted, finite, strict=True) if not good), -1)

    def _read(self, trainer: Trainer, module: LightningModule | None = None) -> None:
        """Wait for the device, agree with the other ranks, and raise or start anew."""
        first = self._first_bad()
        what = "the loss" + (" or a gradient" if self.gradients else "")
        if first < 0 and module is not None and not _weights_are_finite(module):
            # The losses so far were finite, so it was the newest step that broke the weights.
            first, what = max(self._number, 0), "a weight"
        if trainer.strategy.reduce_boolean_decision(first >= 0, all=False):
            self._error = self._explain(trainer, first, what)
            raise self._error
        # The newest stays: a save may still find that its step broke the weights.
        self._recent = {number: note for number, note in self._recent.items() if number == self._number}
        self._remember_checkpoints(trainer)

    def _remember_checkpoints(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            paths = (getattr(callback, name, "") for name in ("best_model_path", "last_model_path"))
            self._good.update(Path(path) for path in paths if path)

    def _explain(self, trainer: Trainer, first: int, what: str) -> NonFiniteLoss:
        own: Any = None
        if first >= 0:
            step, batch_idx, tensors = self._recent.get(first, (trainer.global_step, -1, {}))
            indices = {role: index.flatten().tolist() for role, index in tensors.items()}
            own = (trainer.global_rank, what, step, batch_idx, indices)
        found = [own]
        if trainer.world_size > 1:
            found = [None] * trainer.world_size
            torch.distributed.all_gather_object(found, own)
        rank, what, step, batch_idx, indices = own or next(item for item in found if item is not None)
        self._remember_checkpoints(trainer)
        files = [path for path in self._good if path.exists()]
        checkpoint = max(files, key=lambda path: path.stat().st_mtime, default=None)
        where = f"step {step}" + (f" (batch {batch_idx} of epoch {trainer.current_epoch})" if batch_idx >= 0 else "")
        where += f" on rank {rank}" if trainer.world_size > 1 else ""
        samples = "; ".join(f"{role}: {_short(numbers)}" for role, numbers in indices.items())
        message = f"NonFiniteGuard: {what} became NaN or infinite at {where}."
        message += f" Samples of that batch: {samples}." if samples else ""
        if checkpoint is not None:
            message += f" The last good checkpoint is {checkpoint}."
        else:
            message += " There is no good checkpoint yet."
        message += " A lower learning rate, trainer.gradient_clip_val or precision 32 or bf16 may help"
        return NonFiniteLoss(message, step, indices, checkpoint)


def _indices(batch: Any) -> dict[str, Tensor]:
    """The ``index`` tensors of a batch by role."""
    if not isinstance(batch, dict):
        return {}
    found = {role: part["index"] for role, part in batch.items() if isinstance(part, dict) and "index" in part}
    if isinstance(batch.get("index"), Tensor):
        found["samples"] = batch["index"]
    return {role: index for role, index in found.items() if isinstance(index, Tensor)}


def _saves_every(callback: Any) -> int:
    """After how many steps a checkpoint callback may save within an epoch, or 0.

    Others end up in ``on_save_checkpoint``; but a file of weights alone, which may come at any time, does not.
    """
    bare = getattr(callback, "save_weights_only", False) and getattr(callback, "_train_time_interval", None) is not None
    return 1 if bare else max(getattr(callback, "_every_n_train_steps", 0), 0)


@torch.no_grad()
def _weights_are_finite(module: LightningModule) -> bool:
    weights = [_local(p.detach()) for p in module.parameters() if p.requires_grad and p.is_floating_point()]
    # A sum of norms is NaN or infinite if any entry is; norms in float32, so that half precision does not overflow.
    return not weights or bool(torch.isfinite(torch.stack(torch._foreach_norm(weights, dtype=torch.float32)).sum()))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded parameter: the ranks agree on the result afterwards."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _short(numbers: list[int], most: int = 16) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown + (f", … ({len(numbers)} in all)" if len(numbers) > most else "")
