"""Labels the unlabelled set anew every few epochs: the rounds of self-training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from callbacks.files import by_index, gather_rows, run_folder, write_atomically
from zoo.core.criteria import class_counts
from zoo.core.errors import UserError
from zoo.core.modes import evaluating
from zoo.policies.selection import Selection, harden


class PseudoLabeler(Callback):
    r"""Predicts the unlabelled set with the method's own predictor and gives the result to the data.

    Every round is :math:`P \in [0, 1]^{N \times C}`, the probabilities of ``predict_step``, ordered by the samples'
    stable index. A selection turns it into targets (N, C) and weights (N,), of which 0 leaves a sample out. They are
    handed over by ``datamodule.set_pseudo_labels(index, targets, weights)``, kept in checkpoints, and written to
    ``pseudo_labels.safetensors`` in the run folder (``index`` (N,) int64, ``probabilities`` (N, C) float32, which are
    the targets, ``weights`` (N,) float32, ``round`` () int64). Any other run can read them with
    :func:`read_pseudo_labels`, or through ``pseudo_labels`` of :class:`~datamodules.SemiSupervisedData`.

    Rounds are made at the end of an epoch, before its checkpoint, so that a resumed run sees the labels that the
    uninterrupted one saw; with ``at_start`` also before the first epoch. The ranks share the set out; predictions
    neither see training views nor move the random state. Loggers are told ``round/selected``, the share of samples in
    use, and ``round/accuracy`` where the data module knows the truth, which neither the selection nor the method sees.

    A method may label in a way of its own, from the whole set at once: its ``labeling_step(batch)`` then takes the
    place of ``predict_step`` and gives further rows, and ``pseudo_labels(outputs)`` makes probabilities (N, C) of them.

    The self-training loop that the survey describes (Amini et al. 2022, arXiv 2202.12040) is ``at_start=False``, a
    selection, ``hard``, ``keep``, ``restart`` and ``stop``. Curriculum labeling and noisy students make all labels
    anew in every round: ``keep=False``.

    Args:
        every_n_epochs: relabel after each N epochs; 0 labels only at the start.
        at_start: make a round before training.
        filename: of the file in the run folder; None writes none.
        select: from the number of classes to a :class:`~zoo.policies.selection.Selection`; None uses everything.
        hard: targets are the most probable classes, one-hot.
        keep: samples once selected keep their label and weight; later rounds select among the others only.
        restart: train after every round from the initial weights, with a fresh optimizer and schedule; averages and
            other states of the method start again as well. A schedule as long as the run becomes as long as a round.
        stop: end the training where a round changes nothing, and after a training that used every sample.

    Attributes:
        round: number of the last round; 0 before the first one.
        history: for every round its ``round``, ``epoch``, ``selected`` and, where it is known, ``accuracy``.

    Raises:
        ValueError: for ``every_n_epochs`` below 0, or 0 without ``at_start``.
        UserError: for ``keep`` without ``select``; at setup, if the data module lacks ``pseudo_label_dataloader`` or
            ``set_pseudo_labels``, or if weights are sharded and are to be restarted.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        at_start: bool = True,
        filename: str | None = "pseudo_labels.safetensors",
        select: Callable[[int], Selection] | None = None,
        hard: bool = False,
        keep: bool = False,
        restart: bool = False,
        stop: bool = False,
    ) -> None:
        if every_n_epochs < 0 or (every_n_epochs == 0 and not at_start):
            raise ValueError(
                f"PseudoLabeler: every_n_epochs={every_n_epochs} with at_start={at_start} would never label; "
                "every_n_epochs must be at least 1, or 0 with at_start=True"
            )
        if keep and select is None:
            raise UserError("PseudoLabeler: keep=True needs a selection: without one, the first round labels all")
        self.every_n_epochs = every_n_epochs
        self.at_start = at_start
        self.filename = filename
        self.select = select
        self.hard, self.keep, self.restart, self.stop = hard, keep, restart, stop
        self._fresh: tuple[list[Any], list[Any]] = ([], [])  # states of optimizers and schedules
        self._path: Path | None = None
        self._forget()

    def _forget(self) -> None:
        self.round = 0
        self.epoch = 0  # completed epochs at the last round
        self.index: Tensor | None = None
        self.probabilities: Tensor | None = None
        self.weights: Tensor | None = None
        self.history: list[dict[str, float]] = []
        self.stopped = False
        self._due = False  # whether the next epoch starts from the initial weights
        self._initial: dict[str, Tensor] | None = None
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
        if self.restart and trainer.strategy.restore_checkpoint_after_setup:
            raise UserError("PseudoLabeler: restart=True needs whole weights on every process, such as with ddp")
        self._path = None if self.filename is None else run_folder(trainer) / self.filename
        if trainer.current_epoch == 0 or trainer.current_epoch < self.epoch:  # perhaps it has served another training
            self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give a checkpoint's labels, or make the first: before training loaders have drawn a batch."""
        if self.restart:  # before a checkpoint's optimizers are read
            self._remember_optimizers(trainer)
        if self.round:
            self._give(trainer)
        elif self.at_start and not trainer.ckpt_path:
            self.relabel(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self.stopped

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Some strategies load the checkpoint only after ``on_fit_start``."""
        if self.restart and self._initial is None:
            if trainer.ckpt_path:
                raise UserError(
                    f"PseudoLabeler: restart=True, but {trainer.ckpt_path} is of a run without it and so holds no "
                    "initial weights"
                )
            # The method has prepared its criteria and policies only now.
            self._initial = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
        if self.round and not self._given:
            self._give(trainer)
        # A checkpoint by step, written behind the last batch of an epoch, comes before the round that was due.
        epoch = trainer.current_epoch
        if self.every_n_epochs and epoch and epoch % self.every_n_epochs == 0 and self.epoch < epoch:
            self.advance(trainer, pl_module, epoch)
        if self.at_start and not self.round:  # resumed from a checkpoint that knows of no labels
            self.relabel(trainer, pl_module, epoch)
        self.on_train_epoch_start(trainer, pl_module)  # a resumed loop need not call it

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start again where a round asks for it: only now, so that checkpoints hold what was trained."""
        if self._due:
            self._due = False
            self._start_again(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Relabel after every N whole epochs; an epoch cut short by ``max_steps`` will be finished by a resumed run."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        whole = progress.is_last_batch or progress.current.ready >= trainer.num_training_batches
        epoch = trainer.current_epoch + 1
        # A run with `max_steps` that is resumed behind an epoch's last batch ends that epoch once more.
        if self.every_n_epochs and whole and epoch % self.every_n_epochs == 0 and self.epoch < epoch:
            self.advance(trainer, pl_module, epoch)

    def advance(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        """Go on to the next round after ``epoch`` epochs, unless it is time to stop. Every rank must call it."""
        exhausted = self.stop and self.weights is not None and bool((self.weights > 0).all())
        changed = not exhausted and self.relabel(trainer, pl_module, epoch)
        self.epoch = epoch
        self._due = self.restart
        if self.stop and not changed:
            self.stopped, self._due = True, False
            trainer.should_stop = True

    def relabel(self, trainer: Trainer, pl_module: LightningModule, epoch: int = 0) -> bool:
        """Make one round after ``epoch`` epochs: predict, gather, select, hand over, write. Every rank must call it.

        Returns:
            Whether any sample's weight or class is another than before.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        index, outputs = predict(trainer, pl_module, _shared_out(data.pseudo_label_dataloader(), trainer))
        own = getattr(pl_module, "pseudo_labels", None)
        probabilities = own(outputs) if callable(own) else outputs["probabilities"]
        before, known = self.probabilities, self.weights if self.round else None
        if self.round and not torch.equal(index, self.index):  # type: ignore[arg-type]
            raise UserError("PseudoLabeler: the unlabelled set is not that of the earlier rounds")
        self.round += 1
        self.epoch = epoch
        targets, weights = self._selected(trainer, probabilities)
        changed = bool((weights > 0).any())
        if known is not None and before is not None:
            same = (weights == known) & ((weights == 0) | (targets.argmax(dim=1) == before.argmax(dim=1)))
            changed = not bool(same.all())
        self.index, self.probabilities, self.weights = index, targets, weights
        self._give(trainer)
        self._log(trainer)
        if self._path is not None and trainer.is_global_zero:
            write_pseudo_labels(self._path, self.index, self.probabilities, self.round, self.weights)
        return changed

    def _selected(self, trainer: Trainer, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and weights of a round, of which earlier ones may be kept."""
        targets, weights = probabilities, probabilities.new_ones(len(probabilities))
        if self.select is not None:
            select = self.select(probabilities.shape[1])
            rest = torch.ones(len(weights), dtype=torch.bool)
            if self.keep and self.weights is not None and self.probabilities is not None:
                rest = self.weights == 0
                targets, weights = torch.where(rest[:, None], targets, self.probabilities), self.weights.clone()
            if bool(rest.any()):
                counts = class_counts(trainer.datamodule, probabilities.shape[1])  # type: ignore[attr-defined]
                prior = None if counts is None else counts / counts.sum().clamp_min(1)
                new, weights[rest] = select(probabilities[rest], self.round, self._rounds(trainer), prior)
                targets = targets.clone()
                targets[rest] = new.to(targets.dtype)
        return harden(targets) if self.hard else targets, weights

    def _rounds(self, trainer: Trainer) -> int | None:
        """Rounds that a training follows, where the run has a number of epochs."""
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            return None
        return int(self.at_start) + ((trainer.max_epochs - 1) // self.every_n_epochs if self.every_n_epochs else 0)

    def _give(self, trainer: Trainer) -> None:
        weights = () if self.select is None else (self.weights,)  # data modules may know of no weights
        trainer.datamodule.set_pseudo_labels(self.index, self.probabilities, *weights)  # type: ignore[attr-defined]
        self._given = True

    def _log(self, trainer: Trainer) -> None:
        """To the loggers only: what hidden labels say must be no metric that a run could choose by."""
        score = getattr(trainer.datamodule, "score_pseudo_labels", None)  # type: ignore[attr-defined]
        scores = score(self.index, self.probabilities, self.weights) if callable(score) else {}
        self.history = [*self.history, {"round": self.round, "epoch": self.epoch, **scores}]
        for logger in trainer.loggers:
            logger.log_metrics({f"round/{name}": value for name, value in scores.items()}, step=trainer.global_step)

    def _remember_optimizers(self, trainer: Trainer) -> None:
        """The states that a round starts with; schedules as long as the run are made as long as a round."""
        whole = trainer.estimated_stepping_batches
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        if self.every_n_epochs and whole < float("inf"):
            for schedule in schedules:
                if getattr(schedule, "total_steps", None) == whole:
                    trainer.fit_loop.setup_data()  # does nothing where Lightning has counted the batches already
                    epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
                    schedule.total_steps = min(epoch * self.every_n_epochs, whole)  # type: ignore[attr-defined]
        optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
        self._fresh = optimizers, [copy.deepcopy(schedule.state_dict()) for schedule in schedules]

    def _start_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initial weights and buffers, optimizers without a past, schedules from their first step."""
        assert self._initial is not None
        pl_module.load_state_dict(self._initial)
        for optimizer, state in zip(trainer.optimizers, self._fresh[0], strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))
        for config, state in zip(trainer.lr_scheduler_configs, self._fresh[1], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))

    def state_dict(self) -> dict[str, Any]:
        """The labels in force, and what the rounds to come need."""
        return {
            "round": self.round,
            "epoch": self.epoch,
            "index": self.index,
            "probabilities": self.probabilities,
            "weights": self.weights,
            "history": self.history,
            "stopped": self.stopped,
            "due": self._due,
            "initial": self._initial,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from a checkpoint; one of an earlier version has labels without weights."""
        self.round, self.epoch = state_dict["round"], state_dict["epoch"]
        self.index, self.probabilities = state_dict["index"], state_dict["probabilities"]
        self.weights = state_dict.get("weights")
        if self.weights is None and self.index is not None:
            self.weights = torch.ones(len(self.index))
        self.history = list(state_dict.get("history", []))
        self.stopped, self._due = state_dict.get("stopped", False), state_dict.get("due", False)
        self._initial = state_dict.get("initial")
        self._given = False


@torch.no_grad()
def predict(trainer: Trainer, module: LightningModule, loader: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """``predict_step``, or the ``labeling_step`` of a module that has one, over this rank's loader, gathered.

    Args:
        trainer: a trainer inside ``fit``.
        module: its module; its modes and the random state are left as they were.
        loader: flat evaluation batches with ``index``, shared out over the ranks (repeats do no harm).

    Returns:
        index (N,) int64, sorted, and what else the step gave, float32 of N rows, ``probabilities`` (N, C) among it. All
        are on the CPU and equal on all ranks.
    """
    device = trainer.strategy.root_device
    own = getattr(module, "labeling_step", None)
    rows: dict[str, list[Tensor]] = {}
    with _predicting(trainer, module), trainer.precision_plugin.predict_step_context():
        for number, batch in enumerate(loader):
            batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            output = (own or module.predict_step)(trainer.strategy.batch_to_device(batch), number)
            for key in output if own else ("index", "probabilities"):
                rows.setdefault(key, []).append(output[key] if key == "index" else output[key].float())
    if not rows:
        raise UserError("PseudoLabeler: pseudo_label_dataloader() gave no batch; there is nothing to label")
    index = gather_rows(torch.cat(rows.pop("index")), device)
    ordered, *columns = by_index(index, *(gather_rows(torch.cat(parts), device) for parts in rows.values()))
    return ordered, dict(zip(rows, columns, strict=True))


@contextmanager
def _predicting(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Evaluation mode and the ``predicting`` stage, by which a data module knows to make no training views."""
    stage = trainer.state.stage
    trainer.predicting = True
    try:
        with evaluating(module), isolate_rng(include_cuda=trainer.strategy.root_device.type == "cuda"):
            yield
    finally:
        trainer.state.stage = stage


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


def write_pseudo_labels(
    path: Path, index: Tensor, probabilities: Tensor, number: int, weights: Tensor | None = None
) -> None:
    """Write one round as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {"index": index, "probabilities": probabilities.contiguous(), "round": torch.tensor(number)}
    tensors["weights"] = torch.ones(len(index)) if weights is None else weights.contiguous()
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def read_pseudo_labels(path: str | Path) -> tuple[Tensor, Tensor, int]:
    """Index (N,), probabilities (N, C) and round of a written file, whose ``weights`` (N,) are beside them."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    return tensors["index"], tensors["probabilities"], int(tensors["round"])
