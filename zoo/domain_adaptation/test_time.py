"""What methods that adapt while they are tested share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection

from zoo.core.errors import UserError, suggest
from zoo.core.method import Method
from zoo.core.network import Network
from zoo.optim.virtual import averaged_gradients


class TestTimeAdaptation(Method):
    r"""Base of methods that learn on the source and adapt to unlabelled batches when tested and when they predict.

    Training is cross-entropy on the source, :math:`L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s))`, unless a subclass says
    otherwise; a network that is trained already comes in by ``network.weights``, and ``zoo test`` adapts it. What was
    trained is never changed: a copy adapts, which is thrown away at the end of every test set. Beside the usual
    metrics, those of the network as it was are logged as ``unadapted/accuracy``.

    On several ranks gradients are averaged, so that all copies stay equal. Validation does not adapt.

    Batch: ``source`` {image, label}; at test {image, label}, of which only the image is adapted to.

    Args:
        mode: ``"online"`` carries what was learnt from batch to batch, and begins anew with every test set;
            ``"episodic"`` begins anew with every batch.
        adaptation_steps: gradient steps on a batch, at least 1 where the method takes any.
        adaptation_optimizer: of these steps, from the parameters that adapt.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: for another mode, or fewer steps than 1.
    """

    __test__ = False  # pytest: the name means another test
    source_views: ClassVar[tuple[str, ...]] = ("image",)
    target_views: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        mode: Literal["online", "episodic"] = "online",
        adaptation_steps: int = 1,
        adaptation_optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=1e-3),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        if mode not in ("online", "episodic"):
            near = suggest(mode, ["online", "episodic"])
            raise UserError(f"{name}: mode={mode!r} must be 'online' or 'episodic'.{near}")
        if adaptation_steps < 1:
            raise UserError(f"{name}: adaptation_steps={adaptation_steps} must be at least 1")
        self.mode, self.adaptation_steps = mode, adaptation_steps
        self.adaptation_optimizer_recipe = adaptation_optimizer
        self._copy: tuple[Any, ...] = ()  # in a tuple, so that it is no part of this module and of its checkpoints

    # What a subclass says ---------------------------------------------------------------------------------------------

    @abstractmethod
    def adapt(self, x: Tensor) -> Tensor:
        """Logits (B, C) of a batch by :attr:`adapted`, which learns from it. Gradients are on; no label is known."""

    def prepare_copy(self, network: Network) -> list[nn.Parameter]:
        """Make a fresh copy of the network ready to adapt; returns the parameters that will."""
        return list(network.parameters())

    # What it may use --------------------------------------------------------------------------------------------------

    @property
    def adapted(self) -> Network:
        """The copy that adapts."""
        return self._copy[0]  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Begin anew from what was trained."""
        with torch.inference_mode(False):
            trained: Any = self.predictor
            network = copy.deepcopy(getattr(trained, "module", trained))  # an average holds its network
            network.requires_grad_(False).eval()
            parameters = self.prepare_copy(network)
            for parameter in parameters:
                parameter.requires_grad_()
            optimizer = self.adaptation_optimizer_recipe(parameters) if parameters else None
            self._copy = (network, parameters, optimizer)

    def step(self, loss: Tensor) -> None:
        """One step of the copy down this loss, with the mean gradient of all ranks."""
        _, parameters, optimizer = self._copy
        named = {str(number): parameter for number, parameter in enumerate(parameters)}
        with torch.autocast(loss.device.type, enabled=False):
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        averaged = averaged_gradients(dict(zip(named, gradients, strict=True)))
        for name, parameter in named.items():
            parameter.grad = averaged[name]
        optimizer.step()
        optimizer.zero_grad()

    # The loops --------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels."""
        source = batch["source"]
        return self.report(source=cross_entropy(self.network(source["image"]), source["label"]))

    def adaptive_logits(self, x: Tensor) -> Tensor:
        """Logits (B, C) of a batch that was adapted to. Lightning's inference mode is left for it."""
        with torch.inference_mode(False), torch.enable_grad():
            if not self._copy or self.mode == "episodic":
                self.reset()
            return self.adapt(x.clone()).detach()

    def on_test_epoch_start(self) -> None:
        """Fresh metrics, also for the network as it was; nothing is remembered of earlier tests."""
        super().on_test_epoch_start()
        for name in list(self._metrics):
            self._metrics["unadapted" if name == "test" else f"unadapted_{name}"] = self.build_metrics().to(self.device)
        self._copy = ()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure before and while adapting; every test set begins anew."""
        if batch_idx == 0:
            self._copy = ()
        names = list(self._metrics)
        adapted, before = names[dataloader_idx], names[len(names) // 2 + dataloader_idx]
        self.evaluate(batch, self._metrics[before])
        self.evaluate_adapted(batch, self._metrics[adapted])

    def evaluate_adapted(self, batch: Any, metrics: MetricCollection) -> None:
        """Update ``metrics`` with what the adapting copy says of a batch {image, label}."""
        metrics.update(self.adaptive_logits(batch["image"]), batch["label"])

    def on_test_end(self) -> None:
        """Forget what was adapted."""
        self._copy = ()

    def on_predict_start(self) -> None:
        """Begin anew."""
        self._copy = ()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Class probabilities (B, C) of the adapting copy, with the samples' indices (B,)."""
        return {"index": batch["index"], "probabilities": self.adaptive_logits(batch["image"]).float().softmax(dim=1)}

    def on_predict_end(self) -> None:
        """Forget what was adapted."""
        self._copy = ()
