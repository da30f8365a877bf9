"""What a student of weak labels costs beside fine-tuning on labels."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.benchmark import percentile


def step(
    backbone: str = "tf_efficientnet_lite0", classes: int = 10, size: int = 64, batch: int = 32, steps: int = 12
) -> dict[str, float]:
    """Whole steps (loss, gradient, optimizer) of ``Supervised`` and of every student of this family, one after another.

    Args:
        backbone: fine-tuned, with random weights.
        classes: number of classes.
        size: height and width of an image.
        batch: images in a step.
        steps: measured steps of each.

    Returns:
        20th percentiles of a step's CPU time in microseconds, and their ratio to that of ``Supervised``.
    """
    import zoo
    from zoo.core.network import Network

    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 3, size, size, generator=generator)
    label = torch.randint(classes, (batch,), generator=generator)
    weak = {
        "image": image,
        "probabilities": torch.randn(batch, classes, generator=generator).softmax(dim=1),
        "hidden_label": label,
        "index": torch.arange(batch),
    }
    labeled = {"image": image, "label": label}
    made: dict[str, tuple[Any, torch.optim.Optimizer, dict[str, dict[str, Tensor]]]] = {}
    names = ("Supervised", "NaiveWeakToStrong", "ConfidenceWeakToStrong", "ProductOfExpertsWeakToStrong", "AdaptConf")
    for name in names:
        torch.manual_seed(0)
        method = getattr(zoo, name)(network=partial(Network, backbone=backbone), num_classes=classes)
        method.configure_model()
        optimizer = torch.optim.SGD(method.parameter_groups(), lr=0.01, momentum=0.9)
        made[name] = method, optimizer, {"labeled": labeled} if name == "Supervised" else {"weak": weak}
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(steps + 2):
        for name, (method, optimizer, given) in made.items():
            began = time.thread_time()
            optimizer.zero_grad()
            method.training_step(given, number).backward()
            optimizer.step()
            if number >= 2:
                times[name].append((time.thread_time() - began) * 1e6)
    low = {name: percentile(values, 0.2) for name, values in times.items()}
    figures = {f"cpu_us_{name}": round(value, 1) for name, value in low.items()}
    return figures | {f"ratio_{name}": round(low[name] / low["Supervised"], 4) for name in names[1:]}
