"""Labels that a method gives to its own unlabelled samples while it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Data
from datamodules.samplers import EvalSampler, Loader
from datamodules.sources.base import Samples
from zoo.core.errors import UserError


class _Unlabeled(Dataset):
    """What a labeller may see of samples: no label, no view, no column."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Any) -> dict[str, Tensor]:
        batch = self.samples[draw]
        return {"image": batch["image"], "index": batch["index"]}


class PseudoLabels(Data):
    r"""Data with a role whose samples the ``PseudoLabeler`` callback labels anew every few epochs.

    Training batches of that role carry two further keys, from the first step on:

    - ``pseudo_label`` (B, C) float32: the probabilities last given for these samples, matched by ``index``;
    - ``has_pseudo_label`` (B,) bool: False for samples that were given none; their row of ``pseudo_label`` is zero, so
      that a cross-entropy :math:`-\sum_c q_c \log p_c` against it is zero as well.

    Rows are gathered on the device when a batch arrives there, without waiting for it: batches that workers have read
    ahead get the labels in force too, and a resumed run sees those of the uninterrupted one. The table takes
    4·N·C bytes on the device.
    """

    _labels: tuple[Tensor, Tensor] | None = None

    @property
    def pseudo_label_role(self) -> str | None:
        """The role whose samples are labelled; None where this regime has none."""
        return None

    def pseudo_label_dataloader(self) -> Loader:
        """The role's samples once, in order and shared out over the processes: {image, index}, without random views.

        Raises:
            UserError: when there is no such role.
        """
        role = self._needed_role()
        samples = self.roles[role].samples
        return self._loader(_Unlabeled(samples), EvalSampler(samples, self.eval_batch_size, **self._replicas()))

    def set_pseudo_labels(self, index: Tensor, probabilities: Tensor) -> None:
        """Labels for the batches to come, in place of all earlier ones.

        Args:
            index: (N,) stable numbers of samples, each once; samples left out have no label.
            probabilities: (N, C).

        Raises:
            UserError: when there is no such role, or shapes or numbers do not fit.
        """
        role = self._needed_role()
        ids = self.roles[role].samples.ids
        index, probabilities = index.detach().cpu().long(), probabilities.detach().float().cpu()
        if index.ndim != 1 or probabilities.shape != (len(index), self.num_classes):
            raise UserError(
                f"{self._owner}: pseudo-labels are index (N,) and probabilities (N, {self.num_classes}), "
                f"got {tuple(index.shape)} and {tuple(probabilities.shape)}"
            )
        if len(index) and int(index.min()) < 0:
            raise UserError(f"{self._owner}: pseudo-labels have the index {int(index.min())}, but it is at least 0")
        if len(index.unique()) < len(index):
            raise UserError(f"{self._owner}: pseudo-labels have an index more than once")
        # One row more, of zeros, for all samples without a label.
        rows = torch.full((int(torch.cat([index, ids]).max()) + 1,), len(index))
        rows[index] = torch.arange(len(index))
        self._labels = rows, torch.cat([probabilities, probabilities.new_zeros(1, self.num_classes)])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the device: as everywhere, and the labels."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        role = self.pseudo_label_role
        if role in batch and isinstance(batch[role], dict):
            batch[role].update(self._labels_of(batch[role]["index"]))
        return batch

    def _labels_of(self, index: Tensor) -> dict[str, Tensor]:
        if self._labels is None:
            return {
                "pseudo_label": torch.zeros(len(index), self.num_classes, device=index.device),
                "has_pseudo_label": torch.zeros(len(index), dtype=torch.bool, device=index.device),
            }
        rows, table = self._labels
        if rows.device != index.device:
            rows, table = self._labels = rows.to(index.device), table.to(index.device)
        row = rows[index]
        return {"pseudo_label": table[row], "has_pseudo_label": row < len(table) - 1}

    def _needed_role(self) -> str:
        if self.pseudo_label_role is None:
            raise UserError(f"{self._owner}: no role of this run is without labels; there is nothing to pseudo-label")
        return self.pseudo_label_role
