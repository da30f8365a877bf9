"""Writes the completions of ``zoo predict``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.files import write_atomically
from callbacks.row_writer import RowWriter, write_tensors
from zoo.core.errors import UserError


class CompletionWriter(RowWriter):
    """Completions as texts for people and as tensors for programs.

    ``predictions.jsonl`` has one object a line, ``{"index", "prompt", "completion"}``, in the order of the index.
    ``predictions.safetensors`` holds ``index`` (N,) and ``completion`` (N, T) int64, filled up with -100: what
    :class:`~datamodules.PreferenceData` reads as ``chosen_from`` and ``rejected_from``.

    Args:
        folder: where to write; None is the run folder.
        lines_name: file name of the texts; None writes none.
        tensors_name: file name of the tensors; None writes none.

    Raises:
        UserError: for predictions that are no completions.
    """

    def __init__(
        self,
        folder: str | None = None,
        lines_name: str | None = "predictions.jsonl",
        tensors_name: str | None = "predictions.safetensors",
    ) -> None:
        super().__init__(folder)
        self.lines_name, self.tensors_name = lines_name, tensors_name

    def rows(self, pl_module: LightningModule, outputs: Any, batch: Any) -> tuple[Tensor, ...]:
        """Index (B,), prompts (B, P) and completions (B, T)."""
        if not isinstance(outputs, dict) or not {"index", "prompt", "completion"} <= outputs.keys():
            raise UserError(
                "CompletionWriter: predict_step must return {'index': (B,), 'prompt': (B, P), 'completion': (B, T)}, "
                f"but {type(pl_module).__name__} gave {type(outputs).__name__}"
            )
        return outputs["index"], outputs["prompt"], outputs["completion"]

    def write(self, trainer: Trainer, folder: Path, index: Tensor, columns: Sequence[Tensor]) -> None:
        """Tensors, and texts where the source can decode them."""
        if not trainer.is_global_zero:
            return
        prompts, completions = columns
        data: Any = getattr(trainer, "datamodule", None)
        if self.tensors_name is not None:
            tensors = {"index": index, "completion": completions}
            write_tensors(folder / self.tensors_name, tensors, getattr(data, "predicts", None))
        decode = getattr(getattr(data, "source", None), "decode", None)
        if self.lines_name is not None and decode is not None:
            rows = zip(index.tolist(), prompts.tolist(), completions.tolist(), strict=True)
            made = [{"index": i, "prompt": decode(p), "completion": decode(c)} for i, p, c in rows]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            write_atomically(folder / self.lines_name, lambda path: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
