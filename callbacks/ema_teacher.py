"""Moves the teachers after every optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from zoo.core.errors import UserError
from zoo.core.teachers import EMA


class EMATeacher(Callback):
    """Updates every :class:`~zoo.core.teachers.EMA` of a method once per optimizer step.

    The teachers live in the method, so that checkpoints, devices and strategies see them; this callback only says when
    they move: in ``on_train_batch_end``, where ``global_step`` has advanced. That is right under
    ``accumulate_grad_batches``, and once per training step where manual optimization steps several optimizers.
    (``on_before_zero_grad`` would come after the next batch's forward and lag by a step.)

    The method's ``teacher_pairs`` names each teacher's student. Does nothing for a method without teachers.

    Raises:
        UserError: at the start of training, for an ``EMA`` sub-module that ``teacher_pairs`` leaves out: it would
            silently stay at its random start; and for one whose steps are too small for 16-bit weights to take.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[EMA, nn.Module]] = []
        self._step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the pairs, once the strategy has placed the module."""
        self._pairs = teacher_pairs(pl_module)
        for teacher, _ in self._pairs:
            _check_precision(teacher)
        # A checkpoint taken between an optimizer step and this callback still owes the teachers that step.
        owed = self._step is not None and self._step != trainer.global_step
        self._step = trainer.global_step
        if owed:
            self._move()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the teachers if the optimizer has stepped."""
        step = trainer.global_step
        if step != self._step:
            self._step = step
            self._move()

    def _move(self) -> None:
        for teacher, student in self._pairs:
            teacher.update(student)

    def state_dict(self) -> dict[str, Any]:
        """The step after which the teachers last moved."""
        return {} if self._step is None else {"global_step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take that step from a checkpoint."""
        self._step = state_dict.get("global_step")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run: the same callback may serve another trainer."""
        self._pairs, self._step = [], None


def teacher_pairs(module: LightningModule) -> list[tuple[EMA, nn.Module]]:
    """A method's teachers with their students, checked to be complete.

    Raises:
        UserError: if an ``EMA`` sub-module has no student.
    """
    pairs = list(getattr(module, "teacher_pairs", ()))
    named = {id(teacher) for teacher, _ in pairs}
    for name, child in module.named_modules():
        if isinstance(child, EMA) and id(child) not in named:
            raise UserError(
                f"EMATeacher: {type(module).__name__}.{name} is an EMA, but {type(module).__name__}.teacher_pairs does "
                "not name its student, so it would never move"
            )
    return pairs


def _check_precision(teacher: EMA) -> None:
    """Refuse averages that rounding would hold back: in bfloat16, 0.999 goes a seventh of the way and stops there."""
    for dtype in {p.dtype for p in teacher.parameters() if p.is_floating_point()}:
        if teacher.momentum < 1.0 and 1.0 - teacher.momentum < 8 * torch.finfo(dtype).eps:
            raise UserError(
                f"EMATeacher: an average of momentum={teacher.momentum} cannot move in {str(dtype).split('.')[-1]} "
                "weights, and it is what is evaluated; take precision bf16-mixed or 32, or a smaller momentum"
            )
