"""What methods that adapt while they are tested share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.core.errors import UserError, check_choice
from zoo.core.method import Method
from zoo.core.network import Network
from zoo.core.teachers import Frozen
from zoo.optim.virtual import averaged_gradients, in_layout_of


@dataclass
class Adapting:
    """A copy of what was trained, while it adapts.

    Attributes:
        network: the copy, in evaluation mode.
        named: its parameters that adapt, by name.
        optimizer: of these, if there are any.
    """

    network: Network
    named: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None = None


class TestTimeAdaptation(Method):
    r"""Base of methods that learn on the source and adapt to unlabelled batches when tested and when they predict.

    Training is cross-entropy on the source, :math:`L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s))`, unless a subclass says
    otherwise. A network that is trained already, by whatever method, comes in by its checkpoint:
    ``zoo test -c CONFIG --model.network.weights RUN/checkpoints/last.ckpt``. With ``--ckpt_path``, what is typed of
    :attr:`test_arguments` counts, whatever the checkpoint recorded. What was trained is never changed, and no
    checkpoint holds what was adapted: a copy adapts, in evaluation mode (dropout stays off), which is thrown away at
    the end of every test set. Test sets are therefore independent of each other and of their order, and a second test
    repeats the first, random draws included. Beside the usual metrics, those of the network as it was are logged as
    ``unadapted/accuracy``. Validation does not adapt.

    Figures depend on ``eval_batch_size`` and on the order of the samples, by the nature of the task. On several ranks
    gradients are averaged, so that all copies stay equal; what BatchNorm takes from a batch is of each rank's own,
    unless its layers are SyncBatchNorm.

    Batch: ``source`` {image, label}; at test {image, label}, of which only the image is adapted to.

    Args:
        mode: ``"online"`` carries what was learnt from batch to batch, and begins anew with every test set;
            ``"episodic"`` begins anew with every batch. ``None`` is what the method was published with.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: for another mode; when tested, for a sharded network.
    """

    __test__ = False  # pytest: the name means another test
    source_views: ClassVar[tuple[str, ...]] = ("image",)
    target_views: ClassVar[tuple[str, ...]] = ()
    published_mode: ClassVar[Literal["online", "episodic"]] = "online"
    test_arguments: ClassVar[tuple[str, ...]] = ("mode",)  # those of the constructor that training does not read

    def __init__(self, mode: Literal["online", "episodic"] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if mode is not None:
            check_choice(type(self).__name__, "mode", mode, ("online", "episodic"))
        self.mode = mode or self.published_mode
        self._now: Adapting | None = None  # no module, and so no part of this one and of its checkpoints
        self._adapts = False

    # What a subclass says ---------------------------------------------------------------------------------------------

    @abstractmethod
    def adapt(self, x: Any) -> Tensor:
        """Logits (B, C) of a batch by :attr:`adapted`, which learns from it. Gradients are on; no label is known."""

    def prepare_copy(self, network: Network) -> dict[str, nn.Parameter]:
        """Make a fresh copy of the network ready to adapt; returns the parameters that will, by name."""
        return {}

    def begin(self, images: Iterator[Any]) -> None:
        """A fresh copy is about to meet a test set, all of whose images ``images`` would give."""

    # What it may use --------------------------------------------------------------------------------------------------

    @property
    def now(self) -> Adapting:
        """The copy and what belongs to it."""
        assert self._now is not None  # made by `reset`
        return self._now

    @property
    def adapted(self) -> Network:
        """The copy that adapts."""
        return self.now.network

    def reset(self) -> None:
        """Begin anew from what was trained."""
        with torch.inference_mode(False):
            trained: Any = self.predictor
            network: Any = copy.deepcopy(trained.module if isinstance(trained, Frozen) else trained)
            network.requires_grad_(False).eval()
            self._now = Adapting(network, self.prepare_copy(network))
            for parameter in self.now.named.values():
                parameter.requires_grad_()

    # The loops --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse to copy a network that is in pieces."""
        super().setup(stage)
        if stage in ("test", "predict") and self.device_mesh is not None:
            raise UserError(f"{type(self).__name__}: a sharded network cannot be copied to adapt: test with ddp")

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels."""
        source = batch["source"]
        return self.report(source=cross_entropy(self.network(source["image"]), source["label"]))

    def forward(self, x: Any) -> Tensor:
        """Logits (B, C) of the network as it was trained; inside a test, of the copy that adapts to ``x``."""
        if not self._adapts:
            return self.predictor(x)
        with torch.inference_mode(False), torch.enable_grad():
            if self._now is None or self.mode == "episodic":
                self.reset()
            return self.adapt(apply_to_collection(x, Tensor, Tensor.clone)).detach()

    @contextmanager
    def adapting(self, batch_idx: int, dataloader_idx: int, stage: Literal["test", "predict"]) -> Iterator[None]:
        """Inside, this module's forward adapts. Draws depend on the place in the set alone; every set begins anew."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((batch_idx, self.global_rank)) % 2**63)
            if batch_idx == 0:
                self.reset()
                with torch.inference_mode(False), torch.enable_grad():
                    self.begin(self._images(stage, dataloader_idx))
            self._adapts = True
            try:
                yield
            finally:
                self._adapts = False

    def on_test_epoch_start(self) -> None:
        """Fresh metrics, also for the network as it was."""
        super().on_test_epoch_start()
        for name in list(self._metrics):
            self._metrics["unadapted" if name == "test" else f"unadapted_{name}"] = self.build_metrics().to(self.device)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure before and while adapting."""
        metrics = list(self._metrics.values())
        self.evaluate(batch, metrics[len(metrics) // 2 + dataloader_idx])
        with self.adapting(batch_idx, dataloader_idx, "test"):
            self.evaluate(batch, metrics[dataloader_idx])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Class probabilities (B, C) of the adapting copy, with the samples' indices (B,)."""
        with self.adapting(batch_idx, dataloader_idx, "predict"):
            return super().predict_step(batch, batch_idx, dataloader_idx)

    def on_test_end(self) -> None:
        """Forget what was adapted."""
        self._now = None

    def on_predict_end(self) -> None:
        """Forget what was adapted."""
        self._now = None

    def _images(self, stage: Literal["test", "predict"], dataloader_idx: int) -> Iterator[Any]:
        """Images of a whole set, on the device and as the network takes them, from a loader of its own."""
        data: Any = getattr(self.trainer, "datamodule", None)
        used = self.trainer.test_dataloaders if stage == "test" else self.trainer.predict_dataloaders
        yield from self._inputs(used if data is None else getattr(data, f"{stage}_dataloader")(), dataloader_idx)

    def _inputs(self, loaders: Any, number: int) -> Iterator[Any]:
        several = list(loaders.values()) if isinstance(loaders, dict) else loaders
        loader = several[number] if isinstance(several, list | tuple) else several
        for batch in loader:
            on_device = self.trainer.strategy.batch_to_device(batch, dataloader_idx=number)
            yield apply_to_collection(on_device["image"], Tensor, Tensor.clone)


class GradientAdaptation(TestTimeAdaptation):
    """Base of those that take gradient steps on unlabelled batches.

    Args:
        adaptation_steps: gradient steps on a batch, at least 1.
        adaptation_optimizer: of these steps, from the parameters that adapt.
        prediction: what a batch is predicted with: ``"before"`` the (last) step that it causes, as its forward pass has
            done already, or ``"after"`` it, by one more forward pass. ``None`` is what the method was published with.
        **kwargs: see :class:`TestTimeAdaptation`.

    Raises:
        UserError: for another ``prediction``, or fewer steps than 1.
    """

    published_prediction: ClassVar[Literal["before", "after"]] = "before"
    test_arguments: ClassVar[tuple[str, ...]] = ("mode", "adaptation_steps", "adaptation_optimizer", "prediction")

    def __init__(
        self,
        adaptation_steps: int = 1,
        adaptation_optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=1e-3),
        prediction: Literal["before", "after"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if adaptation_steps < 1:
            raise UserError(f"{type(self).__name__}: adaptation_steps={adaptation_steps} must be at least 1")
        self.adaptation_steps, self.adaptation_optimizer_recipe = adaptation_steps, adaptation_optimizer
        if prediction is not None:
            check_choice(type(self).__name__, "prediction", prediction, ("before", "after"))
        self.prediction = prediction or self.published_prediction

    @abstractmethod
    def learn(self, x: Any) -> Tensor:
        """One step of the copy on a batch; returns the logits (B, C) that it gave before."""

    def adapt(self, x: Any) -> Tensor:
        """Step, and predict."""
        for _ in range(self.adaptation_steps):
            logits = self.learn(x)
        if self.prediction == "before":
            return logits
        with torch.no_grad():
            return self.adapted(x)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of the parameters that adapt, by name: the mean over the ranks."""
        named = self.now.named
        if not named:
            raise UserError(f"{type(self).__name__}: the network has no parameter that could adapt")
        with torch.autocast(loss.device.type, enabled=False):
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        torch.clear_autocast_cache()  # the next forward in this test step would take 16-bit casts of before the step
        own = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
        return averaged_gradients(own)

    def step(self, gradients: dict[str, Tensor]) -> None:
        """One step of the copy's optimizer, which is made at the first."""
        now = self.now
        if now.optimizer is None:
            now.optimizer = self.adaptation_optimizer_recipe(list(now.named.values()))
        for name, gradient in gradients.items():
            now.named[name].grad = in_layout_of(now.named[name], gradient)
        now.optimizer.step()
        now.optimizer.zero_grad()
