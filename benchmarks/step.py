"""A FixMatch step: a bare PyTorch loop, the Trainer alone, the Trainer with all that a run has, and a step's parts."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from zoo.benchmark import percentile, step_timer, time_parts
from zoo.core.network import Network
from zoo.core.parameters import parameter_groups
from zoo.core.teachers import EMA
from zoo.policies import Threshold
from zoo.semi_supervised.fixmatch import FixMatch

CLASSES = 10
TURN = 10  # steps before another loop has its turn
SKIP = 20  # first steps warm up


class Mlp(nn.Sequential):
    """So little work that what remains is the loop itself."""

    def __init__(self, classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))


def recipe(network: str) -> Any:
    """From the number of classes to a network."""
    return Mlp if network == "mlp" else partial(Network, backbone=network, in_channels=3)


def make_batch(network: str, size: int, ratio: int) -> dict[str, dict[str, Tensor]]:
    """One batch of noise, used at every step: the data costs nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 8, 8) if network == "mlp" else (3, 32, 32)

    def images(count: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    labels = torch.randint(CLASSES, (size * (1 + ratio),), generator=generator)
    return {
        "labeled": {"image": images(size), "label": labels[:size]},
        "unlabeled": {"weak": images(size * ratio), "strong": images(size * ratio), "hidden_label": labels[size:]},
    }


class Turns:
    """Lets loops in several threads run a few steps each in turn: what slows the machine down hits all of them."""

    def __init__(self, names: list[str]) -> None:
        self.names = list(names)
        self.changed = threading.Condition()

    def wait(self, name: str) -> None:
        """Until it is ``name``'s turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.names[0] == name)

    def end(self, name: str, leave: bool = False) -> None:
        """Go to the end of the row, or away."""
        with self.changed:
            self.names.remove(name)
            self.names += [] if leave else [name]
            self.changed.notify_all()


class Clock(IterableDataset):
    """Gives the same batch ``steps`` times, ``TURN`` in a row; ``gaps`` is the CPU time of this thread in microseconds.

    The first step of a turn finds cold caches and is left out.
    """

    def __init__(self, batch: dict[str, dict[str, Tensor]], steps: int, turns: Turns, name: str) -> None:
        self.batch, self.steps, self.turns, self.name = batch, steps, turns, name
        self.gaps: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        began = 0.0
        for number in range(self.steps):
            if number % TURN == 0:
                if number:
                    self.turns.end(self.name)
                self.turns.wait(self.name)
            elif number % TURN > 1:
                self.gaps.append((time.thread_time() - began) * 1e6)
            began = time.thread_time()
            yield self.batch


class Step(nn.Module):
    """The step as one would write it by hand."""

    def __init__(self, network: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = recipe(network)(CLASSES)
        self.teacher, self.policy = EMA(self.student, 0.999), Threshold(CLASSES)

    def forward(self, batch: dict[str, dict[str, Tensor]]) -> Tensor:
        """The loss."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        parts = [labeled["image"], unlabeled["weak"], unlabeled["strong"]]
        logits, weak, strong = self.student(torch.cat(parts)).split([len(part) for part in parts])
        targets, weights = self.policy(weak.detach())
        loss = cross_entropy(logits, labeled["label"])
        return loss + (weights * cross_entropy(strong, targets, reduction="none")).mean()

    def optimizer(self) -> torch.optim.Optimizer:
        """As the method's: weight decay, if any, would spare norms and biases, so there are two groups."""
        return torch.optim.SGD(parameter_groups(self.student), lr=0.03, momentum=0.9, nesterov=True)


def bare(network: str, clock: Clock) -> None:
    """A loop without a Trainer, a log or a checkpoint."""
    step = Step(network).train()
    optimizer = step.optimizer()
    for batch in DataLoader(clock, batch_size=None):
        loss = step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step.teacher.update(step.student)


class Plain(LightningModule):
    """The same in a module that has nothing else."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.step = Step(network)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """The loss."""
        return self.step(batch)

    def on_train_batch_end(self, *args: Any) -> None:
        """Move the average."""
        self.step.teacher.update(self.step.student)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same groups."""
        return self.step.optimizer()


OFF: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def alone(network: str, clock: Clock) -> None:
    """Lightning's Trainer with everything off: what nobody who uses it can save."""
    with tempfile.TemporaryDirectory() as folder:
        off = Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, **OFF)
        off.fit(Plain(network), DataLoader(clock, batch_size=None))


def make_trainer(folder: str, **kwargs: Any) -> Trainer:
    """The Trainer as ``zoo fit`` makes it: bar, checkpoints, table of metrics, our callbacks."""
    from lightning.pytorch.callbacks import TQDMProgressBar

    from callbacks import EMATeacher, KeepFreedMemory, NonFiniteGuard, RunSummary, Throughput
    from zoo.core.checkpoint_io import AtomicCheckpointIO, RunCheckpoint
    from zoo.run_folder import RunLogger

    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=RunLogger(folder),
        log_every_n_steps=50,
        callbacks=[
            EMATeacher(),
            KeepFreedMemory(),
            Throughput(),
            RunSummary(),
            NonFiniteGuard(),
            RunCheckpoint(),
            TQDMProgressBar(refresh_rate=20),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        **kwargs,
    )


def make_method(network: str) -> FixMatch:
    """The same step as a method of the zoo."""
    torch.manual_seed(0)
    return FixMatch(network=recipe(network), num_classes=CLASSES, policy=Threshold)


def ours(network: str, clock: Clock) -> None:
    """The same step as a method, under a Trainer with everything that a run has, seeded as ``zoo fit`` is."""
    os.environ["PL_GLOBAL_SEED"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(folder).fit(make_method(network), DataLoader(clock, batch_size=None))


def step(network: str, steps: int = 1000, size: int = 16, ratio: int = 7) -> dict[str, float]:
    """The three loops, a few steps each in turn, in one process.

    Returns:
        20th percentiles of a step's CPU time in microseconds, what ours costs more than the bare loop and than the
        Trainer alone, and the ratio to the bare loop. Means are without the slowest hundredth; the steps that log (one
        in 50) show in them alone.
    """
    loops: dict[str, Callable[[str, Clock], None]] = {"bare": bare, "trainer_alone": alone, "ours": ours}
    turns = Turns(list(loops))
    clocks = {name: Clock(make_batch(network, size, ratio), steps, turns, name) for name in loops}

    def work(name: str) -> None:
        try:
            loops[name](network, clocks[name])
        finally:
            turns.end(name, leave=True)

    threads = [threading.Thread(target=work, args=(name,)) for name in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gaps = {name: sorted(clock.gaps[min(SKIP, len(clock.gaps) // 4) :]) for name, clock in clocks.items()}
    low = {name: percentile(values, 0.2) for name, values in gaps.items()}
    figures = {f"cpu_us_{name}": value for name, value in low.items()}
    figures["cpu_us_over_bare"] = low["ours"] - low["bare"]
    figures["cpu_us_over_trainer_alone"] = low["ours"] - low["trainer_alone"]
    for name, values in gaps.items():
        kept = values[: max(int(len(values) * 0.99), 1)]
        figures[f"cpu_us_mean_{name}"] = sum(kept) / len(kept)
    figures = {name: round(value, 1) for name, value in figures.items()}
    figures["ratio_to_bare"] = round(low["ours"] / low["bare"], 4)
    return figures


def parts(network: str = "wrn_10_1", steps: int = 30, size: int = 8, ratio: int = 3) -> dict[str, float]:
    """Where the time of a step goes, with real views from a real data module."""
    from datamodules import Blobs, SemiSupervisedData

    source = Blobs(num_classes=CLASSES, size=32, channels=3, samples=2000, test_samples=100)
    data = SemiSupervisedData(
        source, labels_per_class=4, batch_size=size, unlabeled_ratio=ratio, steps=steps, val_size=0
    )
    timer = step_timer()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(folder, profiler=timer).fit(make_method(network), data)
    return {f"us_{name}": value for name, value in time_parts(timer.durations).items()}  # type: ignore[attr-defined]
