"""Says at every validation how good the target looks, without its labels: what a model can be chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric

from callbacks.features import evenly, features_of, loader_of, network_of, outputs_of, rows_of
from callbacks.files import by_index, gather_rows
from datamodules.pseudo_labels import Unlabeled
from zoo.core.errors import UserError, suggest
from zoo.core.modes import evaluating
from zoo.core.validators import (
    BatchNuclearNorm,
    InformationMaximization,
    NegativeEntropy,
    deep_embedded_validation,
    density_ratio,
    soft_neighborhood_density,
)

VALIDATORS = (
    "information_maximization",
    "entropy",
    "batch_nuclear_norm",
    "soft_neighborhood_density",
    "deep_embedded_validation",
)


def sees_target(data: Any) -> bool:
    """Whether a data module shows an unlabelled target in training."""
    return getattr(data, "pseudo_label_role", None) == "target"


class TransferValidation(Callback):
    r"""Predicts the target's training samples at every validation, without their labels, and logs ``validator/<name>``.

    All are larger where a model is taken to be better, see :mod:`zoo.core.validators`:

    - ``information_maximization``: entropy of the mean prediction, less the mean entropy;
    - ``entropy``: the mean entropy, negative;
    - ``batch_nuclear_norm``: the nuclear norm of all predictions, 1 where they are certain and balanced;
    - ``soft_neighborhood_density``: whether predictions have many near neighbours;
    - ``deep_embedded_validation``: the error on held-out source samples, weighted by how much they look like the
      target, negative. Needs features, and ``val_size`` above 0.

    :class:`~zoo.core.checkpoint_io.RunCheckpoint` chooses by ``validator/information_maximization`` where it is logged,
    which on the command line is every training of a method that sees a target; name another ``monitor`` to choose by
    another one. The accuracy on the source is ``val/accuracy``. None of them knows what is right: each can be fooled,
    the entropy and the soft neighborhood density by predictions that are all alike.

    The predictor is asked, in evaluation mode; neither the training nor the random state moves. The ranks share the
    samples out, and together say what one process says. Without validation loaders (``val_size: 0``) it runs after
    every epoch.

    Args:
        validators: any of these; the last one must be asked for, because it takes more forward passes.
        max_samples: ``soft_neighborhood_density``, whose time is quadratic in it, and ``deep_embedded_validation``,
            which fits a classifier, look at so many samples of a set at most, evenly spaced. The others see all, in
            time that is linear in their number and memory that does not depend on it.
        temperature: of ``soft_neighborhood_density``.

    Raises:
        UserError: for an unknown validator or a number that is not possible; at setup, for data without a target.
    """

    def __init__(
        self, validators: Sequence[str] = VALIDATORS[:4], max_samples: int = 5000, temperature: float = 0.05
    ) -> None:
        for name in validators:
            if name not in VALIDATORS:
                raise UserError(f"TransferValidation: unknown validator {name!r}.{suggest(name, VALIDATORS)}")
        if not validators:
            raise UserError(f"TransferValidation: validators={validators} must name one of {', '.join(VALIDATORS)}")
        if max_samples < 2 or temperature <= 0:
            raise UserError(
                f"TransferValidation: max_samples={max_samples} must be at least 2, temperature={temperature} above 0"
            )
        self.validators = list(validators)
        self.max_samples, self.temperature = max_samples, temperature
        self._loader: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before anything costs time that there is a target."""
        self._loader = None
        if stage not in ("fit", "validate"):
            return
        data = getattr(trainer, "datamodule", None)
        if not sees_target(data):
            what = type(data).__name__ if data is not None else "a trainer without a data module"
            raise UserError(
                f"TransferValidation: {what} shows no unlabelled target to validate on; a model that is to generalise "
                "is chosen by val/accuracy, that of the source"
            )
        if "deep_embedded_validation" not in self.validators:
            return
        if not data.val_size:  # type: ignore[union-attr]
            raise UserError(
                "TransferValidation: deep_embedded_validation needs held-out source samples: val_size above 0"
            )
        if data.source_free:  # type: ignore[union-attr]
            raise UserError(
                f"TransferValidation: deep_embedded_validation needs source samples, which {type(pl_module).__name__} "
                "must not see; leave it out of the validators"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Beside every validation."""
        if not trainer.sanity_checking:
            self.validate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an epoch of a run whose data holds nothing out."""
        if trainer.limit_val_batches and not sum(trainer.num_val_batches):
            self.validate(trainer, pl_module)

    @torch.no_grad()
    def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict, measure, log. Every rank must call it."""
        with _looking_only(trainer, pl_module):
            values = self.measure(trainer, pl_module)
        named = {f"validator/{name}": values[name].float() for name in self.validators}
        pl_module.log_dict(named, batch_size=1, rank_zero_only=False)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """The value of every validator."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        roles = data.roles if trainer.state.fn == "fit" else data.make_roles()
        samples = roles["target"].samples
        if self._loader is None:
            self._loader = data._loader(Unlabeled(samples), loader_of(trainer, samples).sampler)
        chosen = samples.ids[evenly(len(samples), self.max_samples)]
        device = trainer.strategy.root_device
        kind = torch.float32 if device.type == "mps" else torch.float64
        metrics: dict[str, Metric] = {}
        index, probabilities = [], []
        for number, logits in outputs_of(trainer, self._loader, pl_module):
            if logits.ndim != 2:
                raise UserError(f"TransferValidation: logits of {type(pl_module).__name__} are {tuple(logits.shape)}")
            metrics = metrics or self._metrics(logits.shape[1], kind, device)
            for metric in metrics.values():
                metric.update(logits)
            if "soft_neighborhood_density" in self.validators:
                keep = torch.isin(number, chosen.to(device))
                index.append(number[keep])
                probabilities.append(logits[keep].to(kind).softmax(dim=1))
        values = {name: metric.compute() for name, metric in metrics.items()}
        if index:
            rows = by_index(gather_rows(torch.cat(index), device), gather_rows(torch.cat(probabilities), device))[1]
            values["soft_neighborhood_density"] = soft_neighborhood_density(rows.to(device), self.temperature)
        if "deep_embedded_validation" in self.validators:
            target = samples.subset(evenly(len(samples), self.max_samples))
            features = rows_of(trainer, loader_of(trainer, Unlabeled(target)), network_of(pl_module).features)[1]
            values["deep_embedded_validation"] = -self._risk(trainer, pl_module, roles["source"].samples, features)
        return values

    def _metrics(self, num_classes: int, kind: torch.dtype, device: torch.device) -> dict[str, Metric]:
        known: dict[str, Metric] = {
            "information_maximization": InformationMaximization(num_classes, kind),
            "entropy": NegativeEntropy(kind),
            "batch_nuclear_norm": BatchNuclearNorm(num_classes, kind),
        }
        return {name: metric.to(device) for name, metric in known.items() if name in self.validators}

    def _risk(self, trainer: Trainer, pl_module: LightningModule, train: Any, target: Tensor) -> Tensor:
        """Deep embedded validation of the error 0 or 1."""
        held = trainer.datamodule.evaluation_sets("val")["val"]  # type: ignore[attr-defined]
        some = train.subset(evenly(len(train), self.max_samples))
        source, _ = features_of(trainer, pl_module, some)
        at, labels = features_of(trainer, pl_module, held)
        numbers, logits = rows_of(trainer, loader_of(trainer, held), pl_module)
        wrong = logits.argmax(dim=1)[torch.searchsorted(numbers, held.ids)] != labels
        return deep_embedded_validation(density_ratio(source, target, at), wrong.double())


@contextmanager
def _looking_only(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Evaluation mode; modes and random state are put back."""
    # workers draw a seed
    with evaluating(module), isolate_rng(include_cuda=trainer.strategy.root_device.type == "cuda"):
        yield
