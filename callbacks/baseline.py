"""The supervised baseline on the same labels, beside the method's own figure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.ema_teacher import EMATeacher
from zoo.core.errors import UserError


class SupervisedBaseline(Callback):
    """After training, trains ``method.baseline()`` on the same labelled samples and tests both.

    What a method with few labels is worth shows only beside the same network, optimizer and labels without it. When the
    fit has ended, this callback builds the module that the method's ``baseline()`` returns, trains it quietly on those
    roles of the data module that it needs (an average of its weights included), and evaluates both on the data module's
    test loader with the weights of the last step. :class:`~callbacks.RunSummary` shows the two side by side and writes
    them to ``metrics.json``.

    The run itself is not touched: its random state is put back, and its trainer too. With several processes the
    baseline is left out, with a warning: run it as a training of its own.

    Args:
        max_steps: optimizer steps of the baseline; None is as many as the run made.

    Attributes:
        results: ``{"method": {metric: value}, "baseline": {metric: value}}``, empty before the end.
        steps: how many steps the baseline was trained.

    Raises:
        ValueError: for ``max_steps`` below 1.
        UserError: at setup, without a data module or for a method without a baseline.
    """

    def __init__(self, max_steps: int | None = None) -> None:
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"SupervisedBaseline: max_steps={max_steps} must be at least 1, or None")
        self.max_steps = max_steps
        self.results: dict[str, dict[str, float]] = {}
        self.steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before the long training that the short one is possible."""
        if stage != "fit":
            return
        if getattr(trainer, "datamodule", None) is None:
            raise UserError("SupervisedBaseline needs a data module with a test loader, not loaders given to fit()")
        if not callable(getattr(pl_module, "baseline", None)):
            raise UserError(f"SupervisedBaseline: {type(pl_module).__name__} has no baseline() to compare with")
        if trainer.world_size > 1:
            rank_zero_warn(
                f"SupervisedBaseline is left out with {trainer.world_size} processes. Train it as a run of its own"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the method; train and test the baseline."""
        if trainer.world_size > 1 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        baseline = pl_module.baseline()  # type: ignore[operator]
        if baseline is None:
            return
        self.steps = self.max_steps or trainer.global_step
        with isolate_rng(include_cuda=trainer.strategy.root_device.type == "cuda"):
            method = evaluate(trainer, pl_module)
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
            with _borrowed(trainer, pl_module) as data:
                roles = baseline.card.roles if hasattr(baseline, "card") else ("labeled",)
                short = quiet_trainer(
                    trainer,
                    max_steps=self.steps,
                    max_epochs=-1,
                    limit_val_batches=0,
                    gradient_clip_val=trainer.gradient_clip_val if baseline.automatic_optimization else None,
                    callbacks=[EMATeacher()],
                )
                short.fit(baseline, datamodule=_Part(data, roles))
            self.results = {"method": method, "baseline": evaluate(trainer, baseline, "baseline")}


def evaluate(trainer: Trainer, module: LightningModule, weights: str = "last") -> dict[str, float]:
    """Test metrics of a module on a finished run's data module, by a trainer of its own. Single process only.

    Args:
        trainer: of the run.
        module: to be tested.
        weights: which ones it has, for callbacks that write files at a test and have the attribute ``weights``.
    """
    with _borrowed(trainer, module) as data:
        # Callbacks that measure something at every test of this run say so by this attribute.
        more = [c for c in trainer.callbacks if getattr(c, "measures_tests", False)]  # type: ignore[attr-defined]
        for callback in more:
            if hasattr(callback, "weights"):
                callback.weights = weights
        tester = quiet_trainer(trainer, callbacks=more)
        tester.test(module, datamodule=_Part(data, ()), verbose=False)
        return {name: float(value) for name, value in tester.callback_metrics.items()}


def quiet_trainer(trainer: Trainer, **arguments: Any) -> Trainer:
    """A trainer on the same device with the same precision that leaves nothing behind."""
    device = trainer.strategy.root_device
    return Trainer(
        **{
            "accelerator": device.type,
            "devices": [device.index or 0] if device.type == "cuda" else 1,
            "precision": trainer.precision,
            "limit_test_batches": trainer.limit_test_batches,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": trainer.default_root_dir,
            **arguments,
        }
    )


@contextmanager
def _borrowed(trainer: Trainer, module: LightningModule) -> Iterator[LightningDataModule]:
    """The run's data module; it and the module get their trainer back afterwards."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    mine = module is trainer.lightning_module
    try:
        yield data
    finally:
        data.trainer = trainer
        if mine:
            module.trainer = trainer


class _Part(LightningDataModule):
    """Some roles of another data module, with all its hooks."""

    def __init__(self, data: LightningDataModule, roles: tuple[str, ...]) -> None:
        super().__init__()
        self.data = data
        self.names = roles

    def __getattr__(self, name: str) -> Any:
        """What a method asks its data for besides: that of the whole."""
        if name.startswith("_") or name == "data":
            raise AttributeError(name)
        return getattr(self.data, name)

    @property
    def num_classes(self) -> int | None:
        """That of the whole."""
        return getattr(self.data, "num_classes", None)

    @property
    def source(self) -> Any:
        """That of the whole."""
        return getattr(self.data, "source", None)

    @property
    def eval_batch_size(self) -> int:
        """That of the whole."""
        return getattr(self.data, "eval_batch_size", 256)

    @property
    def roles(self) -> dict[str, Any]:
        """The chosen roles."""
        return {name: role for name, role in getattr(self.data, "roles", {}).items() if name in self.names}

    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def train_dataloader(self) -> Any:
        loaders = self.data.train_dataloader()
        parts = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
        if not isinstance(parts, dict):  # one loader whose batches hold every role
            return loaders
        missing = [role for role in self.names if role not in parts]
        if missing:
            raise UserError(
                f"SupervisedBaseline: {type(self.data).__name__} has no role {missing[0]!r}, only {', '.join(parts)}"
            )
        return CombinedLoader({role: parts[role] for role in self.names}, "min_size")

    def val_dataloader(self) -> Any:
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        return self.data.test_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self.data.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_after_batch_transfer(batch, dataloader_idx)
