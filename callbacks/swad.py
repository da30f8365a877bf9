"""Stochastic weight averaging, densely and for as long as the validation loss stays low."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from callbacks.baseline import evaluate
from callbacks.files import run_folder
from callbacks.heard import HeardLogits
from callbacks.run_summary import weights_of
from zoo.core.distributed import mean_across_ranks, sum_across_ranks
from zoo.core.errors import UserError


class SWAD(Callback):
    r"""Averages the weights after every step of the valley of the validation loss, for flatter minima.

    .. math:: \bar\theta = \frac{1}{t_e - t_s + 1} \sum_{t = t_s}^{t_e} \theta_t

    The loss :math:`E` of the first validation loader (held-out samples of the source domains, never of the target) says
    when. At evaluation k the valley has begun at evaluation :math:`k - N_s + 1` if that was the lowest of the last
    :math:`N_s`; from then on it is over when the last :math:`N_e` losses are all above
    :math:`(1 + r) \tfrac{1}{N_s} \sum E`, the mean being that of those :math:`N_s`, and it ended before them, at
    evaluation :math:`k - N_e`. Otherwise it lasts to the end of the training. It needs an evaluation every few dozen
    steps: a short ``data.steps`` or ``trainer.val_check_interval``.

    BatchNorm's running averages are found anew for the averaged weights, from images of the first role of training
    batches. What comes out is ``checkpoints/swad.ckpt``, for ``zoo test`` and ``network.weights``, and
    ``swad/test/…`` in ``metrics.json``; the module itself ends with the weights of the last step. All parameters are
    averaged, a teacher's as well. Everything is in the checkpoints of the run, so that a resumed one goes on where it
    was.

    Where the paper and the authors' code differ, this is the paper's algorithm. The code puts a segment in twice where
    the valley begins within the first :math:`N_e` evaluations, and overwrites the segment it began with. Where no
    valley was found, the last segment between evaluations is averaged, as in the code, with a warning.

    Args:
        converge: :math:`N_s` ≥ 1, evaluations after which a loss counts as the lowest.
        tolerance: :math:`N_e` ≥ 1, evaluations above the threshold that end the valley.
        tolerance_ratio: r ≥ 0; the authors take 0.2 for VLCS.
        stop: end the training with the valley, as the authors do: later steps change nothing here.
        batch_norm_steps: training batches for the running averages, at most an epoch's; 500 in the authors' code.
        test: test the average at the end, where there is one process and a data module.

    Attributes:
        fit_metrics: ``{"swad/test/accuracy": …}``, empty before the end.
        start_step: :math:`t_s`; None before the valley has begun.
        end_step: :math:`t_e`; None while the valley lasts.

    Raises:
        UserError: if an argument is out of its range; before training, under a strategy that shards parameters; at the
            first validation, where it gives no logits and labels.

    Source: Cha et al. 2021, arXiv 2102.08604, algorithm 1.
    """

    def __init__(
        self,
        converge: int = 3,
        tolerance: int = 6,
        tolerance_ratio: float = 0.3,
        stop: bool = True,
        batch_norm_steps: int = 100,
        test: bool = True,
    ) -> None:
        for name, value, least in (
            ("converge", converge, 1),
            ("tolerance", tolerance, 1),
            ("tolerance_ratio", tolerance_ratio, 0),
            ("batch_norm_steps", batch_norm_steps, 1),
        ):
            if not value >= least:
                raise UserError(f"SWAD: {name}={value} must be at least {least}")
        self.converge, self.tolerance, self.tolerance_ratio = converge, tolerance, tolerance_ratio
        self.stop, self.batch_norm_steps, self.test = stop, batch_norm_steps, test
        self.fit_metrics: dict[str, float] = {}
        self.start_step: int | None = None
        self.end_step: int | None = None
        self._threshold: float | None = None
        self._losses: list[float] = []  # from the start of the valley on; before it, the last `converge`
        self._running, self._valley = Average(), Average()
        # segments between evaluations that are not yet known to be in the valley; before it, each with its last weights
        self._waiting: list[tuple[int, Average, Average]] = []
        self._accepted: int | None = None  # the step of the last evaluation that is
        self._step: int | None = None
        self._path: Path | None = None
        self._heard = HeardLogits()
        self._sums: Tensor | None = None

    # --- the algorithm ------------------------------------------------------------------------------------------------

    def stepped(self, weights: Sequence[Tensor]) -> None:
        """Take in the weights after a step."""
        if self.end_step is None:
            self._running.add(weights)

    def evaluated(self, loss: float, step: int, weights: Sequence[Tensor]) -> None:
        """Close the segment that ends with these weights, whose loss this is: does the valley begin, or end?"""
        if self.end_step is not None:
            return
        here = Average()
        if self._threshold is None:
            here.add(weights)
        self._waiting.append((step, self._running.to_host(), here.to_host()))
        self._losses.append(loss)
        self._running = Average()
        if self._threshold is None:
            self._losses, self._waiting = self._losses[-self.converge :], self._waiting[-self.converge :]
            if len(self._losses) == self.converge and self._losses[0] == min(self._losses):
                self._threshold = (1 + self.tolerance_ratio) * sum(self._losses) / self.converge
                self.start_step, _, self._valley = self._waiting.pop(0)
                self._waiting = [(step, segment, Average()) for step, segment, _ in self._waiting]
            return
        ended = len(self._losses) > self.tolerance and min(self._losses[-self.tolerance :]) > self._threshold
        while len(self._waiting) > self.tolerance:  # what lies before the last losses is in the valley for sure
            self._accepted, segment, _ = self._waiting.pop(0)
            self._valley.join(segment)
        if ended:
            self.end_step, self._waiting = self._accepted or self.start_step, []

    def average(self) -> list[Tensor]:
        """The average as it would be if the training ended here; the algorithm goes on unchanged."""
        total = Average()
        if self._threshold is not None:
            total.join(self._valley)
        parts = [segment for _, segment, _ in self._waiting]
        if self._threshold is None:  # no valley yet: the last segment
            parts = parts[-1:] if not self._running.count else []
        for part in [*parts, *([] if self.end_step is not None else [self._running])]:
            total.join(part.to_host())
        return total.values

    # --- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse parameters that are spread over processes."""
        if stage != "fit":
            return
        if pl_module.device_mesh is not None:
            raise UserError("SWAD: averages whole parameters; take ddp or one process, not a strategy that shards them")
        self.fit_metrics, self._path = {}, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up a step that a checkpoint was written in the middle of."""
        owed = self._step is not None and self._step != trainer.global_step
        self._step = trainer.global_step
        if owed:
            self.stepped(_weights(pl_module))
        if self.end_step is not None and self.stop:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the weights, if the optimizer has stepped."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.stepped(_weights(pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the loss anew, from what the method's own forward gives."""
        self._sums = None
        self._heard.listen(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Sum over one batch of the first loader."""
        heard = self._heard.take(batch)
        if dataloader_idx:
            return
        if not heard:
            raise UserError("SWAD: needs a validation that passes batches {image, label} to logits (B, C)")
        logits, label = heard[-1]
        loss = cross_entropy(logits.float(), label, reduction="sum")
        sums = torch.stack([loss, loss.new_tensor(len(label))]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the algorithm the mean loss over the samples of all ranks."""
        self._heard.leave()
        sums, self._sums = self._sums, None
        if trainer.sanity_checking or sums is None or not self._running.count:
            return
        loss, count = sum_across_ranks(sums).tolist()
        self.evaluated(loss / count, trainer.global_step, _weights(pl_module))
        if self.end_step is not None and self.stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the average as a checkpoint, while the module is still where it was trained."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.start_step is None:
            rank_zero_warn("SWAD: the validation loss has found no valley; the last steps are averaged")
        values = self.average()
        if not values:
            return
        path = run_folder(trainer) / "checkpoints" / "swad.ckpt"
        with exchanged(pl_module, values), isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            self._refresh(trainer, pl_module)
            trainer.save_checkpoint(path, weights_only=True)
        self._path = path

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        if not self.test or self._path is None or getattr(trainer, "datamodule", None) is None:
            return
        if trainer.world_size > 1:
            rank_zero_warn(f"SWAD: with {trainer.world_size} processes the test is left out; use zoo test")
            return
        with weights_of(str(self._path), pl_module):
            found = evaluate(trainer, pl_module)
        self.fit_metrics = {f"swad/{name}": value for name, value in found.items()}

    def _refresh(self, trainer: Trainer, module: LightningModule) -> None:
        """The running averages of BatchNorm, as plain means over training batches of all ranks."""
        predictor: Any = module.predictor
        layers = [m for m in predictor.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if not layers:
            return
        momenta, modes = [layer.momentum for layer in layers], [layer.training for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        dropouts = [m for m in predictor.modules() if m.training and m not in layers and not list(m.children())]
        for dropout in dropouts:
            dropout.eval()
        loader: Any = trainer.fit_loop._combined_loader
        with torch.no_grad():
            for batch, _, _ in itertools.islice(iter(loader), self.batch_norm_steps):
                ready: Any = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                role = next(iter(ready.values()))
                images = role["image"] if "image" in role else next(v for k, v in role.items() if k.startswith("weak"))
                with trainer.precision_plugin.forward_context():
                    predictor(images)
        for layer, momentum, mode in zip(layers, momenta, modes, strict=True):
            layer.momentum = momentum
            layer.train(mode)
            for running in (layer.running_mean, layer.running_var):
                if running is not None:
                    running.copy_(mean_across_ranks(running))
        for dropout in dropouts:
            dropout.train()

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Segments, losses and the place in the algorithm."""
        return {
            "step": self._step,
            "start_step": self.start_step,
            "end_step": self.end_step,
            "accepted": self._accepted,
            "threshold": self._threshold,
            "losses": list(self._losses),
            "running": self._running.state,
            "valley": self._valley.state,
            "waiting": [(step, segment.state, here.state) for step, segment, here in self._waiting],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._step, self._accepted = state_dict["step"], state_dict["accepted"]
        self.start_step, self.end_step = state_dict["start_step"], state_dict["end_step"]
        self._threshold, self._losses = state_dict["threshold"], list(state_dict["losses"])
        self._running, self._valley = Average(*state_dict["running"]), Average(*state_dict["valley"])
        self._waiting = [(step, Average(*a), Average(*b)) for step, a, b in state_dict["waiting"]]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._heard.leave()


class Average:
    """The mean of lists of tensors, in 32 bits or more.

    Args:
        values: the mean so far.
        count: of how many.
    """

    def __init__(self, values: Sequence[Tensor] = (), count: int = 0) -> None:
        self.values, self.count = list(values), count

    @property
    def state(self) -> tuple[list[Tensor], int]:
        """What the constructor takes."""
        return self.values, self.count

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor], count: int = 1) -> None:
        """Take in tensors that stand for ``count``."""
        if not count:
            return
        wide = [x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
        if not self.count:
            self.values = [x.clone() for x in wide]
        else:
            if any(a.device != b.device for a, b in zip(self.values, wide, strict=True)):
                self.values = [a.to(b.device) for a, b in zip(self.values, wide, strict=True)]
            torch._foreach_lerp_(self.values, wide, count / (self.count + count))
        self.count += count

    def join(self, other: Average) -> None:
        """Take in all that another one stands for."""
        self.add(other.values, other.count)

    def to_host(self) -> Average:
        """The same in the host's memory, where it takes nothing from the training's."""
        return Average([x.cpu() for x in self.values], self.count)


@contextmanager
def exchanged(module: LightningModule, values: Sequence[Tensor]) -> Iterator[None]:
    """The module with these values for its parameters; afterwards all that it had is back, buffers included."""
    own = {name: x.clone() for name, x in module.state_dict().items() if isinstance(x, Tensor)}
    try:
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), values, strict=True):
                parameter.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, x in module.state_dict().items():
                if name in own:
                    x.copy_(own[name])


def _weights(module: LightningModule) -> list[Tensor]:
    return [p.detach() for p in module.parameters()]
