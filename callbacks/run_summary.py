"""What a run was, in one table, one file and one picture."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.baseline import SupervisedBaseline, evaluate
from callbacks.files import run_folder, write_atomically
from callbacks.heard import HeardLogits
from callbacks.pseudo_label_diagnostics import PseudoLabelDiagnostics
from callbacks.throughput import Throughput
from zoo.core.errors import UserError

_PACKAGES = ("labelight", "torch", "torchvision", "lightning", "torchmetrics", "timm", "transformers", "numpy")
_LOWER_IS_BETTER = ("loss", "error", "nll", "perplexity", "calibration")


class RunSummary(Callback):
    """Writes ``metrics.json`` and ``summary.png`` into the run folder and prints a table at the end.

    ``metrics.json`` holds ``metrics`` (name → last value; the best of every validation metric as ``best/val/…``;
    what the test says of the checkpoint that was selected, best by the metric that ``best_checkpoint`` names as
    ``monitor``, as ``best/test/…``, and as ``oracle/best/test/…`` where that metric knew labels which a user would not
    have; a baseline's as ``baseline/…``; the last pseudo-labels' as ``pseudo/…``), ``best`` (with step and epoch),
    ``best_checkpoint``, ``pseudo_labels`` (per class), ``domains`` (of a :class:`~callbacks.DomainPictures`),
    ``throughput``, ``steps``, ``epochs``, ``seed``, ``duration_seconds``,
    ``checkpoint``, ``environment``. A test adds its metrics to the file of the fit.
    ``summary.png`` shows the losses, the evaluation metrics, and of the last validation (or test) the confusion matrix
    and the reliability diagram; these two are collected as counts while the method evaluates, without another forward.
    Where a :class:`~callbacks.PseudoLabelDiagnostics` has seen pseudo-labels, it shows them too. The picture also goes
    to TensorBoard and W&B, where these are among the loggers.

    Args:
        test_after_fit: when training has ended (one process only), evaluate on the test set the last weights, and those
            of the checkpoint that was selected where there is one and it is not the last. The table says by which
            metric; one that knows labels of the target (``oracle/…``) only where it was asked for.
        baseline: ``metrics.json`` of another run to show beside this one.
        picture: write ``summary.png``.
        table: print the table.

    Raises:
        UserError: at setup, if ``baseline`` names a file that cannot be read.
    """

    def __init__(
        self, test_after_fit: bool = False, baseline: str | None = None, picture: bool = True, table: bool = True
    ) -> None:
        self.test_after_fit = test_after_fit
        self.baseline = baseline
        self.picture = picture
        self.table = table
        self.best: dict[str, dict[str, float]] = {}
        self.beside: dict[str, dict[str, float]] = {}  # every metric at the step where this one was best
        self.counts: Counts | None = None
        self._compared: dict[str, float] = {}
        self._tested: dict[str, float] = {}
        self._best_tested: dict[str, float] = {}
        self._best_checkpoint: dict[str, Any] = {}
        self._folder = Path()
        self._earlier = 0.0  # seconds of training before this start
        self._began: float | None = None
        self._heard = HeardLogits()

    # --- watching -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder while all ranks are here to agree on it."""
        self._folder = run_folder(trainer)
        self._began, self._tested, self.counts = time.perf_counter(), {}, None
        self._best_tested, self._best_checkpoint = {}, {}
        if self.baseline is not None:
            try:
                self._compared = _numbers(json.loads(Path(self.baseline).read_text(encoding="utf-8"))["metrics"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"RunSummary: baseline={self.baseline!r} is no metrics.json of a run ({error!r})"
                ) from error

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count anew, from what the method's own forward gives."""
        self.counts = None
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
        """Count one batch of the first loader."""
        heard = self._heard.take(batch)
        if dataloader_idx or not heard:
            return
        logits, label = heard[-1]
        if self.counts is None:
            self.counts = Counts(logits.shape[1], logits.device)
        self.counts.update(logits, label)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best of every metric."""
        self._heard.leave()
        if trainer.sanity_checking:
            self.counts = None
            return
        measured = {k: v for k, v in _numbers(trainer.callback_metrics).items() if not k.startswith("train/")}
        for name, value in measured.items():
            known = self.best.get(name)
            sign = -1 if any(word in name for word in _LOWER_IS_BETTER) else 1
            if known is None or sign * value > sign * known["value"]:
                self.best[name] = {"value": value, "step": trainer.global_step, "epoch": trainer.current_epoch}
                self.beside[name] = measured

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the counts over the ranks."""
        self._heard.leave()
        if self.counts is not None:
            self.counts.reduce()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._heard.leave()

    # --- the end ------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the last validation's counts over the ranks while there is still a process group."""
        if self.counts is not None:
            self.counts.reduce()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the last weights, if asked and not done by the baseline, and the selected ones."""
        if not self.test_after_fit or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.world_size > 1:
            rank_zero_warn(f"RunSummary: test_after_fit is left out with {trainer.world_size} processes; use zoo test")
            return
        if _baseline(trainer) is None:
            self._tested = evaluate(trainer, pl_module)
        self._best_checkpoint = best_checkpoint(trainer)
        if self._best_checkpoint and self._best_checkpoint["step"] != trainer.global_step:
            with weights_of(self._best_checkpoint["path"], pl_module):
                self._best_tested = evaluate(trainer, pl_module, "selected")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write and print, after every other callback's end."""
        if not trainer.is_global_zero or trainer.fast_dev_run or stage == "predict":  # type: ignore[attr-defined]
            return
        found = self.collect(trainer, pl_module, stage)
        text = re.sub(r"\[\s+([^\[\]{}\"]+?)\s+\]", _one_line, json.dumps(found, indent=2, sort_keys=False))
        write_atomically(self._folder / "metrics.json", lambda path: _write_text(path, text + "\n"))
        if self.picture:
            from callbacks.picture import draw, show

            for logger in trainer.loggers:
                logger.save()
            figure = draw(
                self._folder / "metrics.csv",
                self.counts,
                getattr(getattr(trainer, "datamodule", None), "classes", None),
                self._title(pl_module),
                _diagnostics(trainer) if stage == "fit" else None,
                self._best_checkpoint if stage == "fit" else None,
            )
            write_atomically(self._folder / "summary.png", lambda path: figure.savefig(path, dpi=110))
            show(figure, trainer.loggers, trainer.global_step)
        if self.table:
            self._print(trainer, pl_module, found, stage)

    def collect(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Any]:
        """The contents of ``metrics.json``."""
        # A test restores the fit's callbacks from the checkpoint, its time included: that is not the test's.
        seconds = self._seconds() - (0.0 if stage == "fit" else self._earlier)
        path = self._folder / "metrics.json"
        found: dict[str, Any] = {}
        if stage != "fit" and path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found = {}
        metrics = {**found.get("metrics", {}), **_numbers(trainer.callback_metrics)}
        if domains := next(filter(None, (getattr(c, "domain_reports", None) for c in _callbacks(trainer))), None):
            found["domains"] = {**found.get("domains", {}), **domains}
        if stage != "fit":
            found["metrics"] = metrics
            found[f"{stage}ed"] = {"checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None}
            found.setdefault("environment", _environment(trainer))
            found.setdefault("duration_seconds", {})[stage] = round(seconds, 3)
            return found
        metrics.update(self._tested)
        for callback in _callbacks(trainer):  # what a callback measured of its own result at the end of the fit
            metrics.update(getattr(callback, "fit_metrics", {}))
        metrics.update({f"best/{name}": entry["value"] for name, entry in self.best.items()})
        baseline = _baseline(trainer)
        if baseline is not None and baseline.results:
            metrics.update(baseline.results["method"])
            metrics.update({f"baseline/{name}": value for name, value in baseline.results["baseline"].items()})
            found["baseline"] = {"steps": baseline.steps}
        elif self._compared:
            own = {name: v for name, v in self._compared.items() if not name.startswith(("best/", "baseline/"))}
            metrics.update({f"baseline/{name}": value for name, value in own.items()})
            found["baseline"] = {"file": self.baseline}
        if self._best_checkpoint:
            last = self._tested if baseline is None else baseline.results.get("method", {})
            prefix = "oracle/best/" if self._best_checkpoint["oracle"] else "best/"
            metrics.update({prefix + name: value for name, value in (self._best_tested or last).items()})
            found["best_checkpoint"] = self._best_checkpoint
        diagnostics = _diagnostics(trainer)
        if diagnostics is not None and diagnostics.values:
            metrics.update({f"pseudo/{name}": value for name, value in diagnostics.values.items()})
            found["pseudo_labels"] = diagnostics.per_class
        data = getattr(trainer, "datamodule", None)
        throughput = next((c.summary for c in _callbacks(trainer) if isinstance(c, Throughput)), {})
        return {
            "method": type(pl_module).__name__,
            "data": type(data).__name__ if data is not None else None,
            "metrics": metrics,
            "best": self.best,
            "throughput": throughput,
            **found,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "seed": int(os.environ["PL_GLOBAL_SEED"]) if os.environ.get("PL_GLOBAL_SEED", "").isdigit() else None,
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "trainable_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "duration_seconds": {"fit": round(seconds, 3)},
            "checkpoint": _checkpoints(trainer),
            "environment": _environment(trainer),
        }

    def _title(self, pl_module: LightningModule) -> str:
        return f"{type(pl_module).__name__} · {self._folder.name}"

    def _seconds(self) -> float:
        return self._earlier + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def _print(self, trainer: Trainer, pl_module: LightningModule, found: dict[str, Any], stage: str) -> None:
        from rich.console import Console
        from rich.table import Table

        metrics, throughput = found["metrics"], found.get("throughput", {})
        groups = ("val/", "test/")  # the others come after them, in their own order
        shown = [name for name in metrics if _shown(name, metrics)]
        shown.sort(key=lambda name: next((i for i, group in enumerate(groups) if name.startswith(group)), len(groups)))
        others = {name.removeprefix("baseline/"): v for name, v in metrics.items() if name.startswith("baseline/")}
        chosen = found.get("best_checkpoint") or {}
        best = self._selected(found)
        if all(value == metrics.get(name) for name, value in best.items()):
            best = {}
        table = Table(title=self._title(pl_module), title_justify="left", show_header=bool(others or best))
        table.add_column("")
        table.add_column(
            type(pl_module).__name__ + (", last" if best and chosen and stage == "fit" else ""), overflow="fold"
        )
        if best:
            table.add_column(f"selected by {chosen['monitor']}" if chosen else "best of each", overflow="fold")
        if others:
            steps = found.get("baseline", {}).get("steps")
            table.add_column("baseline, same labels" + (f", {steps} steps" if steps else ""), overflow="fold")

        def row(name: str, value: str) -> None:
            cells = [f"{column[name]:.4f}" if name in column else "" for column in (best, others) if column]
            table.add_row(name, value, *cells)

        for name in shown:
            row(name, f"{metrics[name]:.4f}")
        if stage == "fit" and throughput:
            row("images/s", f"{throughput['images_per_second']:,.0f}")
            row("waiting for data", f"{throughput['data_wait']:.1%}")
            row("peak memory", f"{throughput['peak_memory_mib']:,.0f} MiB")
        row("time", _clock(found["duration_seconds"].get(stage, 0.0)))
        folder = _shorten(self._folder)
        console = Console()
        console.print(table)
        # Outside the table: lines that one copies must not be broken into cells.
        plain: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False}
        checkpoints = found.get("checkpoint") or {}
        for name, path in checkpoints.items():
            console.print(f"{name} checkpoint  {_shorten(Path(path))}", **plain)
        if chosen and stage == "fit":
            where = "the last weights" if chosen["step"] == trainer.global_step else f"epoch {chosen['epoch'] + 1}"
            aloud = ", which knows labels of the target that a user would not have" if chosen["oracle"] else ""
            console.print(f"selected         {where}, by {chosen['monitor']}{aloud}", **plain)
        for name in ("config.yaml", "metrics.json", "metrics.csv", "summary.png", "domains.png"):
            if (self._folder / name).is_file():
                console.print(f"{name.ljust(15)}  {folder / name}", **plain)
        checkpoint = checkpoints.get("last") or checkpoints.get("best")
        if stage == "fit" and checkpoint and (self._folder / "config.yaml").is_file():
            path = _shorten(Path(checkpoint))
            console.print(f"repeat the test  zoo test --config {folder / 'config.yaml'} --ckpt_path {path}", **plain)

    def _selected(self, found: dict[str, Any]) -> dict[str, float]:
        """What was measured of the selected checkpoint; without one, the best value of every metric."""
        metrics, chosen, best = found["metrics"], found.get("best_checkpoint"), found.get("best", {})
        if not chosen:
            return {name: metrics[f"best/{name}"] for name in metrics if f"best/{name}" in metrics}
        prefix = "oracle/best/" if chosen.get("oracle") else "best/"
        tested = {n: metrics[prefix + n] for n in metrics if prefix + n in metrics and n not in best}
        known = self.best.get(chosen["monitor"], {}).get("step") == chosen["step"]
        return {**(self.beside.get(chosen["monitor"], {}) if known else {}), **tested}

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The best values so far and the time spent."""
        return {"best": self.best, "beside": self.beside, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best, self._earlier = state_dict["best"], state_dict["seconds"]
        self.beside = dict(state_dict.get("beside", {}))


class Counts:
    """Confusion matrix (C, C), rows the truth, and a histogram of confidences: counts, never samples.

    Args:
        num_classes: C.
        device: where to count.
        bins: of equal width over [0, 1].
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", bins: int = 15) -> None:
        self.num_classes, self.bins = num_classes, bins
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
        self.number, self.right, self.confidence = torch.zeros(3, bins, dtype=torch.float64, device=device).unbind()

    @torch.no_grad()
    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count logits (B, C) against labels (B,); labels outside 0..C-1 are passed over."""
        known = (label >= 0) & (label < self.num_classes)
        confidence, predicted = logits[known].float().softmax(dim=1).max(dim=1)
        label = label[known]
        pairs = torch.bincount(label * self.num_classes + predicted, minlength=self.num_classes**2)
        self.confusion = self.confusion + pairs.view(self.num_classes, self.num_classes)
        where = (confidence * self.bins).long().clamp(0, self.bins - 1)
        self.number = self.number + torch.bincount(where, minlength=self.bins)
        right = (predicted == label).double()
        self.right = self.right + torch.bincount(where, right, minlength=self.bins)
        self.confidence = self.confidence + torch.bincount(where, confidence.double(), minlength=self.bins)

    def reduce(self) -> None:
        """Sum over the ranks, onto the CPU. Call it once, on every rank."""
        from zoo.core.distributed import sum_across_ranks

        for name in ("confusion", "number", "right", "confidence"):
            setattr(self, name, sum_across_ranks(getattr(self, name)).cpu())

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float(self.confusion.trace() / self.confusion.sum().clamp(min=1))

    @property
    def calibration_error(self) -> float:
        r"""Expected calibration error :math:`\sum_b \tfrac{n_b}{n} |acc_b - conf_b|` (Guo et al. 2017)."""
        return float((self.right - self.confidence).abs().sum() / self.number.sum().clamp(min=1))


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _baseline(trainer: Trainer) -> SupervisedBaseline | None:
    return next((callback for callback in _callbacks(trainer) if isinstance(callback, SupervisedBaseline)), None)


def _diagnostics(trainer: Trainer) -> PseudoLabelDiagnostics | None:
    found = (callback for callback in _callbacks(trainer) if isinstance(callback, PseudoLabelDiagnostics))
    return next((callback for callback in found if callback.history), None)


def best_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """``path``, ``step`` and ``epoch`` of the checkpoint that was best by a metric (``monitor``, ``value``).

    ``oracle`` says whether that metric knew labels which a user would not have; only somebody who names it as a monitor
    gets such a checkpoint, and one that was chosen without them goes first. Empty where there is none.
    """
    found: dict[str, Any] = {}
    for callback in trainer.checkpoint_callbacks:
        path, monitor = getattr(callback, "best_model_path", ""), getattr(callback, "monitor", None)
        if not path or not Path(path).is_file() or not monitor or monitor.startswith(("test", "train")):
            continue
        oracle = monitor.startswith("oracle")
        if found and oracle:
            continue
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        score = getattr(callback, "best_model_score", None)
        if not found or found["oracle"]:
            found = {
                "path": str(path),
                "step": int(content["global_step"]),
                "epoch": int(content["epoch"]),
                "monitor": monitor,
                "value": None if score is None else float(score),
                "oracle": oracle,
            }
    return found


@contextmanager
def weights_of(path: str, module: LightningModule) -> Iterator[None]:
    """The module with the weights of a checkpoint; afterwards it has its own again, bit for bit."""
    own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in module.state_dict().items()}
    try:
        module.load_state_dict(torch.load(path, weights_only=True, map_location="cpu", mmap=True)["state_dict"])
        yield
    finally:
        module.load_state_dict(own)


def _numbers(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float | Tensor)}


def _shown(name: str, metrics: dict[str, float]) -> bool:
    """Whether the table has a row for it: what the last steps say about pseudo-labels only where no report does."""
    if name.startswith(("best/", "oracle/best/", "baseline/")):
        return False
    if name.startswith("pseudo/"):
        return name in ("pseudo/utilization", "pseudo/accuracy")
    if name == "train/utilization" or name.endswith("pseudo_label_accuracy"):
        return "pseudo/utilization" not in metrics
    return not name.startswith("train/") or name == "train/loss" or "utili" in name


def _checkpoints(trainer: Trainer) -> dict[str, str]:
    found: dict[str, str] = {}
    for callback in trainer.checkpoint_callbacks:
        for name in ("best", "last"):
            path = getattr(callback, f"{name}_model_path", "")
            if path and Path(path).exists():
                found.setdefault(name, str(path))
    return found


def _environment(trainer: Trainer) -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    device = trainer.strategy.root_device
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["device"] = torch.cuda.get_device_name(device)
    else:
        found["device"] = device.type
    return found


def _one_line(numbers: re.Match[str]) -> str:
    return "[" + re.sub(r"\s+", " ", numbers[1]) + "]"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _shorten(path: Path) -> Path:
    """Relative to here where that is shorter to type."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
