"""Labels that a method gives to its own unlabelled samples while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import Data
from datamodules.samplers import EvalSampler, Loader
from datamodules.sources.base import Samples
from zoo.core.errors import UserError


class Unlabeled(Dataset):
    """What may be seen of samples whose labels are hidden: no label, no view, no column."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Any) -> dict[str, Tensor]:
        batch = self.samples[draw]
        return {"image": batch["image"], "index": batch["index"]}


class PseudoLabels(Data):
    r"""Data with a role whose samples the ``PseudoLabeler`` callback labels anew every few epochs.

    Training batches of that role carry three further keys, from the first step on, where somebody gives labels (that
    callback, or :meth:`set_pseudo_labels`) or the method says that it reads them, ``reads_pseudo_labels = True``:

    - ``pseudo_label`` (B, C) float32: the probabilities last given for these samples, matched by ``index``;
    - ``pseudo_label_weight`` (B,) float32 in [0, 1]: how much each counts; 1 where no weights were given;
    - ``has_pseudo_label`` (B,) bool: False for samples that were given none, or one of weight 0; their row of
      ``pseudo_label`` is zero, so that a cross-entropy :math:`-\sum_c q_c \log p_c` against it is zero as well.

    Rows are gathered on the device when a batch arrives there, without waiting for it: batches that workers have read
    ahead get the labels in force too, and a resumed run sees those of the uninterrupted one. The table takes
    4·N·C bytes on the device.
    """

    _labels: tuple[Tensor, Tensor, Tensor] | None = None

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
        return self._loader(Unlabeled(samples), EvalSampler(samples, self.eval_batch_size, **self._replicas()))

    def set_pseudo_labels(self, index: Tensor, probabilities: Tensor, weights: Tensor | None = None) -> None:
        """Labels for the batches to come, in place of all earlier ones.

        Args:
            index: (N,) stable numbers of samples, each once; samples left out have no label.
            probabilities: (N, C).
            weights: (N,) in [0, 1]; of weight 0 is the same as left out. All 1 unless given.

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
        weights = torch.ones(len(index)) if weights is None else weights.detach().float().cpu()
        if weights.shape != index.shape or not bool(((weights >= 0) & (weights <= 1)).all()):
            raise UserError(f"{self._owner}: weights of pseudo-labels are (N,) in [0, 1], got {tuple(weights.shape)}")
        # One row more, of zeros, for all samples without a label.
        rows = torch.full((int(torch.cat([index, ids]).max()) + 1,), len(index))
        rows[index] = torch.arange(len(index))
        given = probabilities * (weights > 0)[:, None]
        table = torch.cat([given, probabilities.new_zeros(1, self.num_classes)])
        self._labels = rows, table, torch.cat([weights, weights.new_zeros(1)])

    def score_pseudo_labels(self, index: Tensor, probabilities: Tensor, weights: Tensor) -> dict[str, float]:
        """How good labels are, to be looked at only: the truth stays here.

        Args:
            index: (N,) stable numbers of samples of the role.
            probabilities: (N, C).
            weights: (N,).

        Returns:
            ``selected``: the share of weights above 0; and ``accuracy``, how often the most probable class of those is
            right, where the truth of any is known.
        """
        samples = self.roles[self._needed_role()].samples
        rows = torch.full((int(torch.cat([index, samples.ids]).max()) + 1,), -1)
        rows[samples.ids] = samples.labels
        used, truth = weights > 0, rows[index]
        scores = {"selected": float(used.float().mean()) if len(index) else 0.0}
        if bool((known := used & (truth >= 0)).any()):
            scores["accuracy"] = float((probabilities.argmax(dim=1) == truth)[known].float().mean())
        return scores

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the device: as everywhere, and the labels."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        role = self.pseudo_label_role
        if role in batch and isinstance(batch[role], dict):
            batch[role].update(self._labels_of(batch[role]["index"]))
        return batch

    @property
    def _pseudo_labels_are_read(self) -> bool:
        """Whether anybody at hand gives or reads labels; nobody is known to outside a trainer, who might."""
        trainer = self.trainer
        if trainer is None or (method := getattr(trainer, "lightning_module", None)) is None:
            return True
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return getattr(method, "reads_pseudo_labels", False) or any(hasattr(c, "relabel") for c in callbacks)

    def _labels_of(self, index: Tensor) -> dict[str, Tensor]:
        if self._labels is None:
            if not self._pseudo_labels_are_read:
                return {}
            return {
                "pseudo_label": torch.zeros(len(index), self.num_classes, device=index.device),
                "pseudo_label_weight": torch.zeros(len(index), device=index.device),
                "has_pseudo_label": torch.zeros(len(index), dtype=torch.bool, device=index.device),
            }
        rows, table, weights = self._labels
        if rows.device != index.device:
            rows, table, weights = (tensor.to(index.device) for tensor in self._labels)
            self._labels = rows, table, weights
        row = rows[index]
        weight = weights[row]
        return {"pseudo_label": table[row], "pseudo_label_weight": weight, "has_pseudo_label": weight > 0}

    def _needed_role(self) -> str:
        if self.pseudo_label_role is None:
            raise UserError(f"{self._owner}: no role of this run is without labels; there is nothing to pseudo-label")
        return self.pseudo_label_role


def read_pseudo_labels(file: str | Path, num_classes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Index (N,), probabilities (N, C) and weights (N,) that a run wrote, by a ``PseudoLabeler`` or ``zoo predict``.

    Raises:
        UserError: when there is no such file, or it holds something else.
    """
    from safetensors.torch import load_file

    from datamodules.weak_labels import read_weak_labels

    if not Path(file).is_file():
        raise UserError(
            f"pseudo_labels={str(file)!r}: there is no such file; a PseudoLabeler or zoo predict writes one"
        )
    found = read_weak_labels(file, num_classes)
    return found["index"], found["probabilities"], load_file(file).get("weights")
