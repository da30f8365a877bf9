"""One picture of a run: what it lost, what it reached, what it confuses, and whether its confidence is right."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def draw(path: Path, metrics: Path, counts: Counts | None, classes: Sequence[str] | None, title: str) -> None:
    """Write ``summary.png``.

    Args:
        path: where.
        metrics: the logger's ``metrics.csv``; may be missing.
        counts: of the last evaluation, on the CPU.
        classes: their names.
        title: of the whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure with its own canvas: pyplot would choose the process's backend.
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    curves = read_curves(metrics)
    training = {name: curve for name, curve in curves.items() if name.startswith("train/")}
    losses = {name: curve for name, curve in training.items() if not _is_share(name, curve)}
    shares = {name: curve for name, curve in curves.items() if name.startswith(("val/", "oracle/"))}
    shares |= {name: curve for name, curve in training.items() if name not in losses}
    _lines(axes[0][0], losses, "training")
    _lines(axes[0][1], shares, "evaluation")
    _confusion(axes[1][0], counts, classes)
    _reliability(axes[1][1], counts)
    figure.savefig(path, dpi=110)


def _is_share(name: str, curve: Curve) -> bool:
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
