"""A method around another one: the strategy that trains it in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn
from torchmetrics import MetricCollection

from zoo.core.method import Method
from zoo.core.teachers import EMA


class MethodRecipe(Protocol):
    """What builds the inner method: its class with its own arguments, without those that every method has."""

    def __call__(
        self,
        *,
        network: Any,
        num_classes: int,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        lr_multipliers: dict[str, float] | None,
        decay_norms_and_biases: bool,
    ) -> Method:
        """The method, with the wrapper's network, classes, optimizer and schedule."""


class Wrapper(Method):
    """Base of strategies that train another method.

    The inner method is asked for everything but :meth:`training_step`: its networks, teachers, parameter groups, views
    and metrics are the wrapper's, and so are the names in the state dict, so that weights of either load into the
    other. What it logs is logged by the wrapper.

    Args:
        method: the inner method's recipe. In YAML its ``class_path`` and its own ``init_args``; network, classes,
            optimizer and schedule are the wrapper's arguments and said once.
        **kwargs: see :class:`~zoo.core.method.Method`.
    """

    method: Any

    def __init__(self, method: MethodRecipe, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        token = _given_hyperparameters.set(None)  # what the command line was told describes the wrapper
        try:
            self.method = method(
                network=self.network_recipe,
                num_classes=self.num_classes,
                optimizer=self.optimizer_recipe,
                scheduler=self.scheduler_recipe,
                lr_multipliers=self.lr_multipliers,
                decay_norms_and_biases=self.decay_norms_and_biases,
            )
        finally:
            _given_hyperparameters.reset(token)
        self.method.log = self.log  # the trainer listens to the outermost module only

    def build(self) -> None:
        """The inner method's networks."""
        self.method.configure_model()

    @property
    def network(self) -> Any:  # type: ignore[override]
        """The inner method's student."""
        return self.method.network

    @property
    def teacher_pairs(self) -> Iterator[tuple[EMA, nn.Module]]:
        """Those of the inner method."""
        return self.method.teacher_pairs

    @property
    def predictor(self) -> nn.Module:
        """That of the inner method."""
        return self.method.predictor

    @property
    def roles(self) -> tuple[str, ...]:
        """Those of the inner method."""
        return self.method.roles

    @property
    def labeled_views(self) -> tuple[str, ...]:
        """Those of the inner method."""
        return self.method.labeled_views

    @property
    def unlabeled_views(self) -> tuple[str, ...]:
        """Those of the inner method."""
        return self.method.unlabeled_views

    @property
    def source_views(self) -> tuple[str, ...]:
        """Those of the inner method."""
        return self.method.source_views

    @property
    def target_views(self) -> tuple[str, ...]:
        """Those of the inner method."""
        return self.method.target_views

    @property
    def reads_pseudo_labels(self) -> bool:
        """What the inner method says."""
        return getattr(self.method, "reads_pseudo_labels", False)

    @property
    def watched(self) -> Any:
        """Where the inner method shows its targets."""
        return self.method.watched

    @watched.setter
    def watched(self, value: Any) -> None:
        self.method.watched = value

    def forward(self, x: Any) -> Tensor:
        """Outputs of the inner method."""
        return self.method(x)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of the inner method, under its names."""
        return self.method.parameter_groups()

    def configure_optimizers(self) -> Any:
        """That of the inner method, whose recipes are the same."""
        return self.method.configure_optimizers()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the inner method: a wrapper has no state of its own."""
        return self.method.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the inner method."""
        return self.method.load_state_dict(*args, **kwargs)

    def on_fit_start(self) -> None:
        """Hand the start on."""
        self.method.on_fit_start()

    def prepare_for(self, data: Any) -> None:
        """Tell the inner method what there is to learn from, if it wants to know."""
        if hasattr(self.method, "prepare_for"):
            self.method.prepare_for(data)

    def baseline(self) -> Any:
        """What the inner method is compared with, if it says."""
        return self.method.baseline() if hasattr(self.method, "baseline") else None

    def build_metrics(self) -> MetricCollection:
        """Those of the inner method."""
        return self.method.build_metrics()

    def evaluate(self, batch: Any, metrics: MetricCollection) -> None:
        """As the inner method does."""
        self.method.evaluate(batch, metrics)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """As the inner method does."""
        return self.method.predict_step(batch, batch_idx, dataloader_idx)
