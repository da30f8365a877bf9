"""Writes what ``zoo predict`` predicts."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.files import write_atomically
from callbacks.row_writer import RowWriter, write_tensors
from zoo.core.errors import UserError


class PredictionWriter(RowWriter):
    """Predictions as a table for people and as tensors for programs.

    ``predictions.csv`` has one row per sample, in the order of their index: ``index``, ``path`` where the samples are
    files, ``label`` (the class's name), ``confidence`` (its probability) and, if asked, one ``p(class)`` column per
    class. ``predictions.safetensors`` holds ``index`` (N,) int64 and ``probabilities`` (N, C) float32, and ``weights``
    (N,) float32 if the method gives them: a weak supervisor's labels for a strong student. Samples that several ranks
    predicted appear once.

    Paths come from the batch (key ``path``, a list) or from the loader's set, where it has ``ids`` (N,) and ``paths``.

    Args:
        folder: where to write; None is the run folder.
        csv_name: file name of the table; None writes none.
        tensors_name: file name of the tensors; None writes none.
        probabilities: add a column per class to the table.

    Raises:
        UserError: for predictions that are not (B, C) probabilities with an index, such as segmentations.
    """

    def __init__(
        self,
        folder: str | None = None,
        csv_name: str | None = "predictions.csv",
        tensors_name: str | None = "predictions.safetensors",
        probabilities: bool = False,
    ) -> None:
        super().__init__(folder)
        self.csv_name = csv_name
        self.tensors_name = tensors_name
        self.probabilities = probabilities
        self._paths: dict[int, str] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with nothing."""
        super().on_predict_start(trainer, pl_module)
        self._paths = {}

    def rows(self, pl_module: LightningModule, outputs: Any, batch: Any) -> tuple[Tensor, ...]:
        """Index (B,), probabilities (B, C) and, where there are any, weights (B,)."""
        probabilities = outputs.get("probabilities") if isinstance(outputs, dict) else None
        if probabilities is None or probabilities.ndim != 2 or "index" not in outputs:
            got = type(outputs).__name__ if probabilities is None else f"probabilities {tuple(probabilities.shape)}"
            raise UserError(
                "PredictionWriter: predict_step must return {'index': (B,), 'probabilities': (B, C)}, "
                f"but {type(pl_module).__name__} gave {got}"
            )
        if isinstance(batch, dict) and "path" in batch:
            self._paths.update(zip(outputs["index"].tolist(), map(str, batch["path"]), strict=True))
        weights = [outputs["weights"].float()] if "weights" in outputs else []
        return outputs["index"], probabilities.float(), *weights

    def write(self, trainer: Trainer, folder: Path, index: Tensor, columns: Sequence[Tensor]) -> None:
        """The tensors and the table."""
        probabilities = columns[0]
        paths = self._all_paths(trainer, index)
        self._paths = {}
        if not trainer.is_global_zero:
            return
        data: Any = getattr(trainer, "datamodule", None)
        classes = getattr(data, "classes", None) or ()
        classes = classes if len(classes) == probabilities.shape[1] else ()
        if self.tensors_name is not None:
            tensors = {"index": index} | dict(zip(("probabilities", "weights"), columns, strict=False))
            write_tensors(folder / self.tensors_name, tensors, getattr(data, "predicts", None), classes)
        if self.csv_name is not None:
            names = [str(name) for name in classes or range(probabilities.shape[1])]
            self._write_csv(folder / self.csv_name, index, probabilities, paths, names)

    def _all_paths(self, trainer: Trainer, index: Tensor) -> list[str] | None:
        parts = [self._paths]
        if trainer.world_size > 1:
            parts = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self._paths)
        known = {number: path for part in parts for number, path in part.items()}
        if known:
            return [known.get(number, "") for number in index.tolist()]
        samples = getattr(trainer.predict_dataloaders, "dataset", None)
        ids, files = getattr(samples, "ids", None), getattr(samples, "paths", None)
        if ids is None or files is None:
            return None
        by_id = dict(zip(ids.tolist(), files, strict=True))
        return [str(by_id.get(number, "")) for number in index.tolist()]

    def _write_csv(
        self, path: Path, index: Tensor, probabilities: Tensor, paths: list[str] | None, names: list[str]
    ) -> None:
        confidence, label = probabilities.max(dim=1)

        def write(temporary: Path) -> None:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                header = ["index", *(["path"] if paths is not None else []), "label", "confidence"]
                writer.writerow(header + ([f"p({name})" for name in names] if self.probabilities else []))
                for row, number in enumerate(index.tolist()):
                    cells = [number, *([paths[row]] if paths is not None else []), names[label[row]]]
                    cells.append(f"{confidence[row]:.6f}")
                    if self.probabilities:
                        cells += [f"{value:.6f}" for value in probabilities[row].tolist()]
                    writer.writerow(cells)

        write_atomically(path, write)
