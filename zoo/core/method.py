"""The class that every method extends."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.evaluation import Evaluated
from zoo.core.hooks import LeanHooks
from zoo.core.network import Network
from zoo.core.parameters import parameter_groups
from zoo.core.persistence import Persistent
from zoo.core.sharding import shard
from zoo.core.teachers import EMA


class Method(Persistent, Evaluated, LeanHooks):
    """A training algorithm: recipes in, losses out.

    A subclass says what its batches hold and writes :meth:`training_step`. The constructor takes recipes, callables
    that build, rather than modules: nothing is built before :meth:`build`, which runs once, under the trainer's
    strategy, and a method can build several networks from one recipe.

    Args:
        network: from the number of outputs to a :class:`~zoo.core.network.Network`.
        num_classes: number of classes; the command line takes it from the data.
        optimizer: from parameters to an optimizer.
        scheduler: from an optimizer to a schedule that advances every optimizer step. One with ``total_steps=None`` is
            told the run's length.
        lr_multipliers: learning-rate multiples by the beginning of a parameter's name, such as
            ``{"network.backbone": 0.1}``; the longest match counts.
        decay_norms_and_biases: whether weight decay also acts on vectors (biases and the gains of norms).
    """

    card: ClassVar[Card]
    network: Network

    def __init__(
        self,
        network: Callable[[int], Network],
        num_classes: int,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True),
        scheduler: LRSchedulerCallable | None = None,
        lr_multipliers: dict[str, float] | None = None,
        decay_norms_and_biases: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"{type(self).__name__}: num_classes={num_classes} must be at least 1")
        if isinstance(network, nn.Module):
            raise UserError(
                f"{type(self).__name__}: network must be a recipe such as functools.partial(Network, backbone='lenet'),"
                f" not a built {type(network).__name__}"
            )
        self.num_classes = num_classes
        self.network_recipe = network
        self.optimizer_recipe = optimizer
        self.scheduler_recipe = scheduler
        self.lr_multipliers = lr_multipliers or {}
        self.decay_norms_and_biases = decay_norms_and_biases
        self.built = False

    def build(self) -> None:
        """Make the networks. A subclass calls ``super().build()`` and adds its own."""
        self.network = self.network_recipe(self.num_classes)

    def configure_model(self) -> None:
        """Build once, and shard where the strategy has a device mesh. Lightning calls this in every stage."""
        if self.built:
            return
        self.build()
        self.built = True
        # Ranks keep these equal themselves, and ddp would broadcast all their rows at every step.
        parts = [(f"{prefix}." if prefix else "", part) for prefix, part in self.named_modules()]
        rows = [prefix + name for prefix, part in parts for name in getattr(part, "sized_by_data", ())]
        self._ddp_params_and_buffers_to_ignore = rows
        if self.device_mesh is not None:
            shard(self, self.device_mesh)

    @property
    def roles(self) -> tuple[str, ...]:
        """Parts of the batch that the method reads, as its card says."""
        return self.card.roles if hasattr(self, "card") else ()

    @property
    def teacher_pairs(self) -> Iterator[tuple[EMA, nn.Module]]:
        """Each average with the student that it follows."""
        if isinstance(teacher := getattr(self, "teacher", None), EMA):
            yield teacher, self.network

    @property
    def predictor(self) -> nn.Module:
        """The network that is evaluated and that predicts: the average where the method keeps one."""
        return next((teacher for teacher, _ in self.teacher_pairs), self.network)

    def forward(self, x: Any) -> Tensor:
        """Logits (B, C) of the :attr:`predictor`. Inference, always."""
        return self.predictor(x)

    @property
    def progress(self) -> float:
        """Completed fraction of training in [0, 1]; 0 outside a trainer and, with a warning, in an endless run."""
        if self._trainer is None:
            return 0.0
        if not (steps := self.trainer.estimated_stepping_batches) < float("inf"):
            rank_zero_warn(
                f"{type(self).__name__}: without max_steps or max_epochs, what follows the progress stays as it begins"
            )
            return 0.0
        return min(self.trainer.global_step / steps, 1.0)

    def on_train_start(self) -> None:
        """Hand a checkpoint's place in the data over: a schedule as long as the run asked for the loaders before it."""
        self.trainer.fit_loop._load_combined_loader_states()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Seed the step where the run is seeded: dropout after a resume is then what it would have been."""
        if seed := os.environ.get("PL_GLOBAL_SEED"):
            mixed = hash((int(seed), self.trainer.current_epoch, batch_idx, self.global_rank)) % 2**63
            torch.default_generator.manual_seed(mixed)  # `torch.manual_seed` walks the stack where CUDA sleeps
            if self.device.type == "cuda":
                torch.cuda.manual_seed(mixed)

    def report(self, **terms: Tensor) -> Tensor:
        """The loss: the sum of its terms, each logged as ``train/<term>``."""
        loss = functools.reduce(operator.add, terms.values())
        self.observe(loss=loss, **terms)
        return loss

    @property
    def logs_now(self) -> bool:
        """Whether the logger keeps this step: what is only looked at need not be computed at the others."""
        trainer = self._trainer  # `self.trainer` costs more than the answer
        return trainer is not None and trainer.training and trainer._logger_connector.should_update_logs

    def observe(self, **values: Tensor) -> None:
        """Log scalars as ``train/<name>``, at the steps that the logger keeps and no others.

        One ``self.log`` costs as much as a small step, so the gate comes first; nothing synchronises with the device.
        """
        if self.logs_now:
            self.log_dict({f"train/{k}": v.detach() for k, v in values.items()}, batch_size=1)

    def configure_optimizers(self) -> Any:
        """One optimizer over :meth:`parameter_groups`, with the schedule stepping every optimizer step."""
        optimizer = self.optimizer_recipe(self.parameter_groups())  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("lr_multiplier", 1.0)
        if self.scheduler_recipe is None:
            return optimizer
        scheduler: Any = self.scheduler_recipe(optimizer)
        if getattr(scheduler, "total_steps", 0) is None:
            scheduler.total_steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trainable parameters in groups of equal learning-rate multiple and weight decay."""
        return parameter_groups(self, self.lr_multipliers, self.decay_norms_and_biases)

    def setup(self, stage: str) -> None:
        """Check that the data and this module agree on the classes before anything runs."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise UserError(
                f"{type(self).__name__} was built for {self.num_classes} classes,"
                f" but {type(data).__name__} has {classes}"
            )
