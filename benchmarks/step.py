"""A FixMatch step: a bare PyTorch loop, the Trainer with our callbacks, and the parts of a step."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from zoo.benchmark import percentile, step_timer, time_parts
from zoo.core.network import Network
from zoo.core.teachers import EMA
from zoo.policies import Threshold
from zoo.semi_supervised.fixmatch import FixMatch

CLASSES = 10
SKIP = 5  # first steps warm caches


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


class Clock(IterableDataset):
    """Gives the same batch ``steps`` times and notes when it was asked for: differences are whole steps."""

    def __init__(self, batch: dict[str, dict[str, Tensor]], steps: int) -> None:
        self.batch, self.steps = batch, steps
        self.times: list[float] = []
        self.cpu: list[float] = []  # of this process: what a busy neighbour takes does not count

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        for _ in range(self.steps):
            self.times.append(time.perf_counter())
            self.cpu.append(time.process_time())
            yield self.batch

    def figures(self) -> dict[str, float]:
        """Microseconds: the 20th percentile stands against a busy machine, the median beside it."""
        figures = {}
        for name, stamps in (("us", self.times), ("cpu_us", self.cpu)):
            gaps = [(b - a) * 1e6 for a, b in itertools.pairwise(stamps)][SKIP:]
            figures[f"{name}_per_step"] = round(percentile(gaps, 0.2), 1)
            figures[f"{name}_median"] = round(percentile(gaps, 0.5), 1)
        return figures


def bare(network: str, steps: int = 1000, size: int = 16, ratio: int = 7) -> dict[str, float]:
    """The step as one would write it by hand, without a Trainer, a log or a checkpoint."""
    torch.manual_seed(0)
    student = recipe(network)(CLASSES).train()
    teacher, policy = EMA(student, 0.999), Threshold(CLASSES)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    clock = Clock(make_batch(network, size, ratio), steps)
    for batch in DataLoader(clock, batch_size=None):
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        parts = [labeled["image"], unlabeled["weak"], unlabeled["strong"]]
        logits, weak, strong = student(torch.cat(parts)).split([len(part) for part in parts])
        targets, weights = policy(weak.detach())
        loss = cross_entropy(logits, labeled["label"])
        loss = loss + (weights * cross_entropy(strong, targets, reduction="none")).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
    return clock.figures()


def make_trainer(folder: str, **kwargs: Any) -> Any:
    """The Trainer as ``zoo fit`` makes it: bar, checkpoints, table of metrics, our callbacks."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import TQDMProgressBar

    from callbacks import EMATeacher, NonFiniteGuard, RunSummary, Throughput
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


def trainer(network: str, steps: int = 1000, size: int = 16, ratio: int = 7) -> dict[str, float]:
    """The same step under the Trainer with everything that a run has."""
    clock = Clock(make_batch(network, size, ratio), steps)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(folder).fit(make_method(network), DataLoader(clock, batch_size=None))
    return clock.figures()


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
