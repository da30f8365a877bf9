"""Writes what ``zoo predict`` returns, once, in the order of the samples."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.files import by_index, gather_rows, run_folder, write_atomically


class RowWriter(Callback, ABC):
    """Rows of every batch and rank, each sample once, handed to :meth:`write` at the end.

    Args:
        folder: where to write; None is the run folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._rows: list[tuple[Tensor, ...]] = []

    @abstractmethod
    def rows(self, pl_module: LightningModule, outputs: Any, batch: Any) -> tuple[Tensor, ...]:
        """What is kept of a batch: the index (B,), then further columns (B, ...)."""

    @abstractmethod
    def write(self, trainer: Trainer, folder: Path, index: Tensor, columns: Sequence[Tensor]) -> None:
        """Write all rows, sorted by index. Called on every rank; ``trainer.is_global_zero`` writes."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with nothing."""
        self._rows = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep one batch, on the host."""
        self._rows.append(tuple(column.cpu() for column in self.rows(pl_module, outputs, batch)))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather and write."""
        if not self._rows:
            return
        device = trainer.strategy.root_device
        parts = [gather_rows(torch.cat(part), device) for part in zip(*self._rows, strict=True)]
        index, *columns = by_index(*parts)
        folder = run_folder(trainer) if self.folder is None else Path(self.folder)
        self.write(trainer, folder, index, columns)
        trainer.strategy.barrier("rows")
        self._rows = []


def write_tensors(path: Path, tensors: dict[str, Tensor], samples: str | None, classes: Sequence[Any] = ()) -> None:
    """A safetensors file.

    Args:
        path: of the file.
        tensors: by name.
        samples: whose numbers the index has: those of a test set are none of the training set.
        classes: their names, where columns belong to them.
    """
    from safetensors.torch import save_file

    metadata = {} if samples is None else {"samples": samples}
    if classes:
        metadata["classes"] = json.dumps([str(name) for name in classes])
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(whole, temporary, metadata=metadata or None))
