"""Averages of weights, views and loaders, each against what one would use otherwise."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from zoo.benchmark import percentile


def microseconds(work: Callable[[], Any], repeats: int, skip: int = 3) -> float:
    """The 20th percentile of the time of one call."""
    times = []
    for _ in range(repeats + skip):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e6)
    return round(percentile(times[skip:], 0.2), 1)


def _student(backbone: str) -> nn.Module:
    from zoo.core.network import Network

    torch.manual_seed(0)
    return Network(10, backbone=backbone)


def ema_ours(backbone: str = "wrn_28_2", repeats: int = 300) -> dict[str, float]:
    """One update of :class:`zoo.EMA`."""
    from zoo.core.teachers import EMA

    student = _student(backbone)
    teacher = EMA(student, 0.999)
    return {"us_per_update": microseconds(lambda: teacher.update(student), repeats)}


def ema_averaged_model(backbone: str = "wrn_28_2", repeats: int = 300, multi: bool = False) -> dict[str, float]:
    """One update of torch's AveragedModel, by parameter (as Lightning uses it) or by list."""
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

    student = _student(backbone)
    how = {"multi_avg_fn": get_ema_multi_avg_fn(0.999)} if multi else {"avg_fn": get_ema_avg_fn(0.999)}
    average = AveragedModel(student, use_buffers=True, **how)
    return {"us_per_update": microseconds(lambda: average.update_parameters(student), repeats)}


def _images(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def views_batched(size: int = 32, count: int = 112, repeats: int = 30) -> dict[str, float]:
    """A weak and a strong view of a batch, at once."""
    from datamodules.transforms import Strong, Weak

    images, weak, strong = _images(count, size), Weak(), Strong()
    return {
        "us_weak": microseconds(lambda: weak(images), repeats),
        "us_strong": microseconds(lambda: strong(images), repeats),
    }


def views_per_sample(size: int = 32, count: int = 112, repeats: int = 5) -> dict[str, float]:
    """The same views, image by image, with torchvision's operations."""
    from datamodules.transforms import Strong, Weak

    images, weak, strong = _images(count, size), Weak().per_sample(), Strong().per_sample()
    return {
        "us_weak": microseconds(lambda: torch.stack([weak(image) for image in images]), repeats),
        "us_strong": microseconds(lambda: torch.stack([strong(image) for image in images]), repeats),
    }


class _PerSample(Dataset):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index], "index": index}


def _per_batch(loader: Any, epochs: int = 5) -> dict[str, float]:
    times = []
    for _ in range(epochs):
        iterator = iter(loader)
        while True:
            started = time.perf_counter()
            if next(iterator, None) is None:
                break
            times.append((time.perf_counter() - started) * 1e6)
    return {"us_per_batch": round(percentile(times, 0.2), 1)}


def loader_ours(samples: int = 10_000, batch_size: int = 112) -> dict[str, float]:
    """Whole index lists from a RepeatSampler."""
    from datamodules.samplers import Loader, RepeatSampler
    from datamodules.sources import TensorSamples

    data = TensorSamples(_images(samples, 32), torch.zeros(samples, dtype=torch.long))
    return _per_batch(Loader(data, RepeatSampler(data, batch_size, samples // batch_size)))  # type: ignore[arg-type]


def loader_per_sample(samples: int = 10_000, batch_size: int = 112) -> dict[str, float]:
    """PyTorch's DataLoader as it is usually written: one sample at a time, collated."""
    data = _PerSample(_images(samples, 32), torch.zeros(samples, dtype=torch.long))
    return _per_batch(DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True))
