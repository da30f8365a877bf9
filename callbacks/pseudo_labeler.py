"""Labels the unlabelled set anew every few epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from callbacks.files import by_index, gather_rows, run_folder, write_atomically
from zoo.core.errors import UserError


class PseudoLabeler(Callback):
    r"""Predicts the unlabelled set with the method's own predictor and gives the result to the data.

    Every round is :math:`P \in [0, 1]^{N \times C}`, the probabilities of ``predict_step``, ordered by the samples'
    stable index. It is handed over by ``datamodule.set_pseudo_labels(index, probabilities)``, kept in checkpoints, and
    written to ``pseudo_labels.safetensors`` in the run folder (``index`` (N,) int64, ``probabilities`` (N, C) float32,
    ``round`` () int64), which any other run can read with :func:`read_pseudo_labels`.

    Rounds are made at the end of an epoch, before its checkpoint, so that a resumed run sees the labels that the
    uninterrupted one saw; with ``at_start`` also before the first epoch. The ranks share the set out; predictions
    neither see training views nor move the random state.

    Args:
        every_n_epochs: relabel after each N epochs; 0 labels only at the start.
        at_start: make a round before training.
        filename: of the file in the run folder; None writes none.

    Raises:
        ValueError: for ``every_n_epochs`` below 0, or 0 without ``at_start``.
        UserError: at setup, if the data module lacks ``pseudo_label_dataloader`` or ``set_pseudo_labels``.
    """

    def __init__(
        self, every_n_epochs: int = 1, at_start: bool = True, filename: str | None = "pseudo_labels.safetensors"
    ) -> None:
        if every_n_epochs < 0 or (every_n_epochs == 0 and not at_start):
            raise ValueError(
                f"PseudoLabeler: every_n_epochs={every_n_epochs} with at_start={at_start} would never label; "
                "every_n_epochs must be at least 1, or 0 with at_start=True"
            )
        self.every_n_epochs = every_n_epochs
        self.at_start = at_start
        self.filename = filename
        self.round = 0
        self.epoch = 0  # completed epochs at the last round
        self.index: Tensor | None = None
        self.probabilities: Tensor | None = None
        self._path: Path | None = None
        self._given = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the data module before anything costs time."""
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        for needed in ("pseudo_label_dataloader", "set_pseudo_labels"):
            if not callable(getattr(data, needed, None)):
                what = type(data).__name__ if data is not None else "the trainer's missing data module"
                raise UserError(f"PseudoLabeler: {what} has no {needed}(); use a data module for pseudo-labels")
        self._path = None if self.filename is None else run_folder(trainer) / self.filename

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give a checkpoint's labels, or make the first: before training loaders have drawn a batch."""
        if self.round:
            self._give(trainer)
        elif self.at_start and not trainer.ckpt_path:
            self.relabel(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Some strategies load the checkpoint only after ``on_fit_start``."""
        if self.round and not self._given:
            self._give(trainer)
        # A checkpoint by step, written behind the last batch of an epoch, comes before the round that was due.
        epoch = trainer.current_epoch
        if self.every_n_epochs and epoch and epoch % self.every_n_epochs == 0 and self.epoch < epoch:
            self.relabel(trainer, pl_module, epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Relabel after every N whole epochs; an epoch cut short by ``max_steps`` will be finished by a resumed run."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        whole = progress.is_last_batch or progress.current.ready >= trainer.num_training_batches
        if self.every_n_epochs and whole and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.relabel(trainer, pl_module, trainer.current_epoch + 1)

    def relabel(self, trainer: Trainer, pl_module: LightningModule, epoch: int = 0) -> None:
        """Make one round after ``epoch`` epochs: predict, gather, hand over, write. Every rank must call it."""
        loader = trainer.datamodule.pseudo_label_dataloader()  # type: ignore[attr-defined]
        self.index, self.probabilities = predict(trainer, pl_module, _shared_out(loader, trainer))
        self.round += 1
        self.epoch = epoch
        self._give(trainer)
        if self._path is not None and trainer.is_global_zero:
            write_pseudo_labels(self._path, self.index, self.probabilities, self.round)

    def _give(self, trainer: Trainer) -> None:
        trainer.datamodule.set_pseudo_labels(self.index, self.probabilities)  # type: ignore[attr-defined]
        self._given = True

    def state_dict(self) -> dict[str, Any]:
        """The labels in force."""
        return {"round": self.round, "epoch": self.epoch, "index": self.index, "probabilities": self.probabilities}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        self.round, self.epoch = state_dict["round"], state_dict["epoch"]
        self.index, self.probabilities = state_dict["index"], state_dict["probabilities"]
        self._given = False


@torch.no_grad()
def predict(trainer: Trainer, module: LightningModule, loader: Any) -> tuple[Tensor, Tensor]:
    """``predict_step`` over this rank's loader, gathered.

    Args:
        trainer: a trainer inside ``fit``.
        module: its module; its modes and the random state are left as they were.
        loader: flat evaluation batches with ``index``, shared out over the ranks (repeats do no harm).

    Returns:
        index (N,) int64, sorted, and probabilities (N, C) float32, both on the CPU and equal on all ranks.
    """
    device = trainer.strategy.root_device
    index, probabilities = [], []
    with _predicting(trainer, module), trainer.precision_plugin.predict_step_context():
        for number, batch in enumerate(loader):
            batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            output = module.predict_step(trainer.strategy.batch_to_device(batch), number)
            index.append(output["index"])
            probabilities.append(output["probabilities"].float())
    if not index:
        raise UserError("PseudoLabeler: pseudo_label_dataloader() gave no batch; there is nothing to label")
    rows = by_index(gather_rows(torch.cat(index), device), gather_rows(torch.cat(probabilities), device))
    return rows[0], rows[1]


@contextmanager
def _predicting(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Evaluation mode and the ``predicting`` stage, by which a data module knows to make no training views."""
    modes = {child: child.training for child in module.modules()}
    stage = trainer.state.stage
    module.eval()
    trainer.predicting = True
    try:
        with isolate_rng(include_cuda=trainer.strategy.root_device.type == "cuda"):
            yield
    finally:
        trainer.state.stage = stage
        for child, mode in modes.items():
            child.training = mode


class _Share:
    """Every R-th batch of a sampler; as many for every rank, because a sharded model communicates in ``forward``."""

    def __init__(self, batches: Any, rank: int, ranks: int) -> None:
        batches = list(batches)
        self.batches = batches[rank::ranks]
        if len(self.batches) < -(-len(batches) // ranks):
            self.batches.append(batches[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _shared_out(loader: Any, trainer: Trainer) -> Any:
    """A plain ``DataLoader`` made to read only this rank's part; any other loader is taken to do so itself."""
    if trainer.world_size == 1 or not isinstance(loader, DataLoader) or isinstance(loader.sampler, DistributedSampler):
        return loader
    batched = loader.batch_sampler is not None
    share = _Share(loader.batch_sampler if batched else loader.sampler, trainer.global_rank, trainer.world_size)
    return DataLoader(
        loader.dataset,
        **({"batch_sampler": share} if batched else {"sampler": share, "batch_size": None}),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


def write_pseudo_labels(path: Path, index: Tensor, probabilities: Tensor, number: int) -> None:
    """Write one round as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {"index": index, "probabilities": probabilities.contiguous(), "round": torch.tensor(number)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def read_pseudo_labels(path: str | Path) -> tuple[Tensor, Tensor, int]:
    """Index (N,), probabilities (N, C) and round of a written file."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    return tensors["index"], tensors["probabilities"], int(tensors["round"])
