"""One picture of a run: what it lost, what it reached, what it confuses, and whether its confidence is right."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from callbacks.pseudo_label_diagnostics import PseudoLabelDiagnostics
    from callbacks.run_summary import Counts

Curve = tuple[list[float], list[float]]


def read_curves(path: Path) -> dict[str, Curve]:
    """Every column of a ``metrics.csv`` as (steps, values), without its gaps."""
    curves: dict[str, Curve] = {}
    if not path.is_file():
        return curves
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name in ("step", "epoch", None) or not text or not row.get("step"):
                    continue
                try:
                    step, value = float(row["step"]), float(text)
                except ValueError:  # a row cut short by a crash
                    continue
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return curves


def draw(
    metrics: Path,
    counts: Counts | None,
    classes: Sequence[str] | None,
    title: str,
    diagnostics: PseudoLabelDiagnostics | None = None,
    selected: Mapping[str, Any] | None = None,
) -> Figure:
    """The picture of a run.

    Args:
        metrics: the logger's ``metrics.csv``; may be missing.
        counts: of the last evaluation, on the CPU.
        classes: their names.
        title: of the whole.
        diagnostics: what is known of pseudo-labels; without it, or without anything in it, there are no panels of them.
        selected: ``step`` and ``monitor`` of the checkpoint that was chosen: a line among the evaluations.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: Any = [["losses", "evaluation"], ["confusion", "reliability"]]
    watched = diagnostics if diagnostics is not None and diagnostics.history else None
    quality = {} if watched is None else {k: v for k, v in watched.per_class.items() if "share" not in k}
    if watched is not None:
        panels = [[*panels[0], "pseudo", "classes"], [*panels[1], "quality", "quality"]]
        if not quality:
            panels = [panels[0][:3], [*panels[1][:2], "classes"]]
    # A figure with its own canvas: pyplot would choose the process's backend.
    figure = Figure(figsize=(5 * len(panels[0]), 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplot_mosaic(panels)
    curves = read_curves(metrics)
    training = {name: curve for name, curve in curves.items() if name.startswith("train/")}
    losses = {name: curve for name, curve in training.items() if not _is_share(name)}
    shares = {name: curve for name, curve in curves.items() if name.startswith(("val/", "oracle/"))}
    shares |= {name: curve for name, curve in training.items() if name not in losses and watched is None}
    _lines(axes["losses"], losses, "training")
    if shares and selected:
        label = f"selected by {selected['monitor']}"
        axes["evaluation"].axvline(selected["step"], color="grey", linestyle=":", linewidth=1.5, label=label)
    _lines(axes["evaluation"], shares, "evaluation")
    _confusion(axes["confusion"], counts, classes)
    _reliability(axes["reliability"], counts)
    if watched is not None:
        rows = watched.history
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "epoch")))
        over_time = {
            name: ([r["step"] for r in rows if name in r], [r[name] for r in rows if name in r]) for name in names
        }
        _lines(axes["pseudo"], over_time, "pseudo-labels")
        axes["pseudo"].set_ylim(-0.02, 1.02)
        shown = {"pseudo-labels": watched.per_class["share"], "hidden labels": watched.per_class.get("hidden_share")}
        _per_class(axes["classes"], {k: v for k, v in shown.items() if v is not None}, classes, "share of the classes")
        if quality:
            _per_class(axes["quality"], quality, classes, "pseudo-labels per class")
            axes["quality"].set_ylim(0, 1.02)
    return figure


def show(figure: Figure, loggers: Iterable[Any], step: int, name: str = "summary") -> None:
    """Hand the picture to those loggers that take pictures, under this name: TensorBoard and W&B."""
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    wanted = [logger for logger in loggers if isinstance(logger, TensorBoardLogger | WandbLogger)]
    if not wanted:
        return
    import numpy as np

    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
    for logger in wanted:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
        else:
            logger.log_image(name, [pixels])


def _is_share(name: str) -> bool:
    return "utili" in name or "accuracy" in name


def _nothing(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="grey")
    axis.set_xticks([])
    axis.set_yticks([])


def _lines(axis: Any, curves: dict[str, Curve], title: str) -> None:
    axis.set_title(title)
    if not curves:
        _nothing(axis, "nothing was logged")
        return
    for name, (steps, values) in sorted(curves.items()):
        axis.plot(steps, values, label=name, linewidth=1.5, marker="." if len(values) < 30 else None)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _confusion(axis: Any, counts: Counts | None, classes: Sequence[str] | None) -> None:
    axis.set_title("confusion matrix")
    if counts is None or not int(counts.confusion.sum()):
        _nothing(axis, "no class predictions were evaluated")
        return
    rows = counts.confusion.double()
    shares = rows / rows.sum(dim=1, keepdim=True).clamp(min=1)
    axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    count = counts.num_classes
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if count > 30:
        return
    names = list(classes) if classes and len(classes) == count else [str(number) for number in range(count)]
    axis.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize="small")
    axis.set_yticks(range(count), names, fontsize="small")
    if count <= 12:
        for row in range(count):
            for column in range(count):
                number = int(rows[row, column])
                if number:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axis.text(column, row, number, ha="center", va="center", fontsize=7, color=colour)


def _per_class(
    axis: Any, values: Mapping[str, Sequence[float | None]], classes: Sequence[str] | None, title: str
) -> None:
    """Bars of each class, side by side; many classes as points, sorted by the last values, which are a line."""
    axis.set_title(title)
    count = len(next(iter(values.values())))
    columns = {name: [float("nan") if v is None else v for v in column] for name, column in values.items()}
    if count > 30:
        by = list(columns.values())[-1]
        order = sorted(range(count), key=lambda c: -by[c] if by[c] == by[c] else 1.0)
        for name, column in columns.items():
            look: dict[str, Any] = {"linewidth": 1.5} if column is by else {"linestyle": "none", "marker": "."}
            axis.plot([column[c] for c in order], label=name, markersize=3, **look)
        axis.set_xlabel(f"classes, by {list(columns)[-1]}")
    else:
        width = 0.8 / len(columns)
        for number, (name, column) in enumerate(columns.items()):
            where = [c + (number - (len(columns) - 1) / 2) * width for c in range(count)]
            axis.bar(where, column, width=width, label=name)
        names = list(classes) if classes and len(classes) == count else [str(c) for c in range(count)]
        axis.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize="small")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small")


def _reliability(axis: Any, counts: Counts | None) -> None:
    axis.set_title("reliability")
    if counts is None or not float(counts.number.sum()):
        _nothing(axis, "no class predictions were evaluated")
        return
    filled = counts.number > 0
    confidence = (counts.confidence[filled] / counts.number[filled]).numpy()
    accuracy = (counts.right[filled] / counts.number[filled]).numpy()
    share = (counts.number / counts.number.sum()).numpy()
    edges = [bin_ / counts.bins for bin_ in range(counts.bins)]
    axis.bar(edges, share, width=1 / counts.bins, align="edge", color="lightgrey", label="share of samples")
    axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    axis.plot(confidence, accuracy, marker="o", label=f"accuracy (calibration error {counts.calibration_error:.3f})")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_xlabel("confidence")
    axis.legend(fontsize="small", loc="upper left")
