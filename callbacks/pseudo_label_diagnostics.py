"""What the pseudo-labels of a run are like: how many are used, how many are right, and of which classes they are."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from zoo.core.distributed import sum_across_ranks
from zoo.core.errors import UserError
from zoo.policies import Policy

Watched = tuple[Tensor, Tensor, Tensor | None]  # classes (B,), weights (B,), hidden labels (B,)


class PseudoLabelDiagnostics(Callback):
    r"""Counts the pseudo-labels that a method shows by ``watch``, and says at every validation what they were like.

    Over the steps since the last report, on all ranks, with weights :math:`w_i`, pseudo-labels :math:`\hat y_i` (the
    most probable class, where targets are soft) and hidden labels :math:`y_i`:

    - ``pseudo/utilization`` :math:`= \tfrac1n \sum_i w_i`;
    - ``pseudo/accuracy`` :math:`= \sum_i w_i [\hat y_i = y_i] / \sum_i w_i`, over samples whose class is known;
    - ``pseudo/class_coverage``: the share of classes that have any weight;
    - ``pseudo/class_distance`` :math:`= \tfrac12 \sum_c |h_c - \bar h_c| \in [0, 1]`, the total variation between the
      weighted histogram :math:`h` of the pseudo-labels and :math:`\bar h` of the hidden labels;
    - ``pseudo/threshold``: the mean over the classes of the policy's threshold, where it has one per class.

    These go to the loggers. Per class, for ``metrics.json`` and the picture (:attr:`per_class`): ``share``
    :math:`h_c`, ``hidden_share`` :math:`\bar h_c`, ``precision`` (the right share of the class's weight), ``recall``
    (the weight on right labels per sample of the class) and ``threshold``. What no sample tells is left out, per class
    ``None``.

    A step only keeps references to three small tensors; they are counted together every few steps, on the device, and
    the host reads the counts once a report. The values are no metrics of the trainer: nothing may be chosen by hidden
    labels. Counts are kept in checkpoints. Methods that never watch are left alone.

    Args:
        every_n_steps: count together so many steps.

    Attributes:
        values: the last report, by name without ``pseudo/``; empty before the first one.
        per_class: the last report per class.
        history: all reports, with ``step`` and ``epoch``.

    Raises:
        UserError: for ``every_n_steps`` below 1.
    """

    def __init__(self, every_n_steps: int = 32) -> None:
        if every_n_steps < 1:
            raise UserError(f"PseudoLabelDiagnostics: every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.history: list[dict[str, float]] = []
        self.per_class: dict[str, list[float | None]] = {}
        self._counts: PseudoLabelCounts | None = None
        self._pending: list[Watched] = []
        self._restored: dict[str, Any] | None = None

    @property
    def values(self) -> dict[str, float]:
        """The last report."""
        return {k: v for k, v in self.history[-1].items() if k not in ("step", "epoch")} if self.history else {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the method to show its pseudo-labels, if it can."""
        self._pending, self._counts = [], None
        if not hasattr(pl_module, "watched"):
            return
        pl_module.watched = self._pending  # type: ignore[assignment]
        self._counts = PseudoLabelCounts(int(pl_module.num_classes), trainer.strategy.root_device)  # type: ignore[arg-type]
        if self._restored is not None and trainer.is_global_zero:  # they are those of all ranks
            self._counts.add(self._restored["sums"], self._restored["samples"])
        self._restored = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count when some steps have gathered."""
        if len(self._pending) >= self.every_n_steps:
            self._count()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report beside every validation of a training."""
        if not trainer.sanity_checking:
            self._report(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what no validation has."""
        self._report(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the rest, and look no longer."""
        self._report(trainer, pl_module)
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Look no longer."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        if hasattr(pl_module, "watched"):
            pl_module.watched = None  # type: ignore[assignment]
        self._counts, self._pending = None, []

    def _count(self) -> None:
        if self._counts is not None and self._pending:
            classes, weights = (torch.cat([step[part] for step in self._pending]) for part in (0, 1))  # type: ignore[misc]
            hidden = [torch.full_like(c, -1) if h is None else h for c, _, h in self._pending]
            self._counts.update(classes, weights, torch.cat(hidden))
        self._pending.clear()  # the method holds the same list

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._counts is None:
            return
        self._count()
        self._counts.reduce()
        if self._counts.samples:
            thresholds = class_thresholds(pl_module)
            values, self.per_class = self._counts.values(thresholds), self._counts.per_class(thresholds)
            self.history.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **values})
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the logger's own count
            for logger in trainer.loggers:
                logger.log_metrics({f"pseudo/{name}": value for name, value in values.items()}, step=step)
        self._counts.clear()

    def state_dict(self) -> dict[str, Any]:
        """The reports so far, and the counts since the last one on all ranks: every rank must call this."""
        if self._counts is None:
            return {"history": self.history, "per_class": self.per_class} if self.history else {}
        self._count()
        sums, samples = self._counts.total()
        return {"history": self.history, "per_class": self.per_class, "sums": sums.cpu(), "samples": samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.history, self.per_class = state_dict.get("history", []), state_dict.get("per_class", {})
        self._restored = state_dict if "sums" in state_dict else None


class PseudoLabelCounts:
    """Sums per class of a stretch of training, on the device: (4, C), whatever the number of samples.

    The rows: weight given to the class; that of samples whose class is known; that of right ones; samples whose hidden
    label is the class. A last column takes what belongs to no class.

    Args:
        num_classes: C.
        device: where to count.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.sums = torch.zeros(4, num_classes + 1, dtype=kind, device=device)
        self.samples = 0

    @torch.no_grad()
    def update(self, classes: Tensor, weights: Tensor, hidden: Tensor) -> None:
        """Count samples of pseudo-labels (B,), weights (B,) and hidden labels (B,), which are -1 where unknown."""
        weights, count = weights.to(self.sums.dtype), self.num_classes
        known = (hidden >= 0) & (hidden < count)
        given = classes.where((classes >= 0) & (classes < count), count).long()
        index = torch.stack([given, given, given, hidden.where(known, count).long()])
        values = torch.stack([weights, weights * known, weights * (known & (classes == hidden)), known.to(weights)])
        self.sums.scatter_add_(1, index, values)
        self.samples += len(classes)

    def add(self, sums: Tensor, samples: int) -> None:
        """Add the sums (4, C + 1) of another stretch."""
        self.sums += sums.to(self.sums)
        self.samples += samples

    def clear(self) -> None:
        """Start anew."""
        self.sums.zero_()
        self.samples = 0

    def total(self) -> tuple[Tensor, int]:
        """The sums over all ranks, and the number of samples. Every rank must call this."""
        flat = torch.cat([self.sums.flatten(), self.sums.new_tensor([self.samples])])
        flat = sum_across_ranks(flat)
        return flat[:-1].view_as(self.sums), int(flat[-1])

    def reduce(self) -> None:
        """Replace the sums by those over all ranks."""
        sums, self.samples = self.total()
        self.sums.copy_(sums)

    def values(self, thresholds: Tensor | None = None) -> dict[str, float]:
        """The report's scalars, see :class:`PseudoLabelDiagnostics`."""
        every = self.sums.cpu().double()
        (given, known, right, hidden), used = every[:, :-1], float(every[0].sum())
        found = {
            "utilization": used / max(self.samples, 1),
            "class_coverage": float((given > 0).double().mean()),
        }
        if known.sum() > 0:
            found["accuracy"] = float(right.sum() / known.sum())
        if hidden.sum() > 0 and given.sum() > 0:
            found["class_distance"] = float((given / given.sum() - hidden / hidden.sum()).abs().sum() / 2)
        if thresholds is not None:
            found["threshold"] = float(thresholds.double().mean())
        return found

    def per_class(self, thresholds: Tensor | None = None) -> dict[str, list[float | None]]:
        """Name to C values, see :class:`PseudoLabelDiagnostics`."""
        given, known, right, hidden = self.sums.cpu().double()[:, :-1]
        found = {"share": _ratio(given, given.sum())}
        if hidden.sum() > 0:
            found["hidden_share"] = _ratio(hidden, hidden.sum())
            found["precision"] = _ratio(right, known)
            found["recall"] = _ratio(right, hidden)
        if thresholds is not None:
            found["threshold"] = [round(value, 6) for value in thresholds.double().tolist()]
        return found


def _ratio(part: Tensor, whole: Tensor) -> list[float | None]:
    return [round(value, 6) if value == value else None for value in (part / whole).tolist()]  # 0 / 0 is unknown


def class_thresholds(module: torch.nn.Module) -> Tensor | None:
    """What the first policy that has a threshold per class says of them, (C,) on the CPU."""
    for policy in module.modules():
        if isinstance(policy, Policy) and (thresholds := policy.thresholds()) is not None:
            return thresholds.detach().float().cpu()
    return None
