"""ShrinkMatch: the search for the shrunk class spaces against a loop, and its step against FixMatch's."""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.pieces import microseconds
from zoo.benchmark import percentile


def _inputs(classes: int, size: int) -> tuple[Tensor, Tensor]:
    """Auxiliary logits, and predictions from hopeless to certain."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.5, 4, size).unsqueeze(1)
    logits = torch.randn(size, classes, generator=generator).requires_grad_()
    return logits, (spread * torch.randn(size, classes, generator=generator)).softmax(dim=1)


def _timed(work: Any, logits: Tensor, repeats: int) -> dict[str, float]:
    return {
        "us_forward": microseconds(work, repeats),
        "us_forward_backward": microseconds(lambda: torch.autograd.grad(work(), logits), repeats),
    }


def loss_ours(classes: int = 10, size: int = 448, threshold: float = 0.95, repeats: int = 30) -> dict[str, float]:
    """All samples at once: a sort, a cumulative sum and a masked cross-entropy."""
    from zoo.losses.shrink import shrink_loss, shrunk_space

    logits, p = _inputs(classes, size)

    def work() -> Tensor:
        confidence = p.amax(dim=1)
        losses = shrink_loss(logits, *shrunk_space(p, threshold))
        return ((confidence < threshold) * confidence * losses).mean()

    return _timed(work, logits, repeats)


def loss_loop(classes: int = 10, size: int = 448, threshold: float = 0.95, repeats: int = 5) -> dict[str, float]:
    """As it is usually written: sample by sample, one class after the other taken away."""
    logits, p = _inputs(classes, size)

    def work() -> Tensor:
        total = logits.new_zeros(())
        ordered, order = p.sort(dim=1, descending=True)
        for z, sample, ranks in zip(logits, ordered, order, strict=True):
            if sample[0] >= threshold:
                continue
            for cut in range(2, classes):
                if sample[0] / (sample[0] + sample[cut:].sum()) >= threshold:
                    among = torch.cat([ranks[:1], ranks[cut:]])
                    total = total + sample[0] * (z[among].logsumexp(dim=0) - z[ranks[0]])
                    break
        return total / size

    return _timed(work, logits, repeats)


def step(
    classes: int = 10, network: str = "wrn_28_2", steps: int = 12, size: int = 8, ratio: int = 3
) -> dict[str, float]:
    """A whole step of both methods, one of each in turn: loss, gradient, optimizer and average of weights.

    Returns:
        20th percentiles of a step's CPU time in microseconds, and their ratio.
    """
    from zoo.core.network import Network
    from zoo.policies import Threshold
    from zoo.semi_supervised.fixmatch import FixMatch
    from zoo.semi_supervised.shrinkmatch import ShrinkMatch

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (size * (1 + ratio),), generator=generator)
    weak, strong = (torch.randn(size * ratio, 3, 32, 32, generator=generator) for _ in range(2))
    batch = {
        "labeled": {"image": torch.randn(size, 3, 32, 32, generator=generator), "label": labels[:size]},
        "unlabeled": {"weak": weak, "strong": strong, "hidden_label": labels[size:]},
    }
    recipe, made = partial(Network, backbone=network), {}
    for cls, arguments in ((FixMatch, {"policy": Threshold}), (ShrinkMatch, {})):
        torch.manual_seed(0)
        method = cls(network=recipe, num_classes=classes, **arguments)  # type: ignore[arg-type]
        method.configure_model()
        made[cls.__name__.lower()] = method, torch.optim.SGD(method.parameter_groups(), lr=0.01, momentum=0.9)
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(steps + 2):
        for name, (method, optimizer) in made.items():
            began = time.thread_time()
            optimizer.zero_grad()
            method.training_step(batch, number).backward()
            optimizer.step()
            for teacher, student in method.teacher_pairs:
                teacher.update(student)
            if number >= 2:
                times[name].append((time.thread_time() - began) * 1e6)
    low = {name: percentile(values, 0.2) for name, values in times.items()}
    figures = {f"cpu_us_{name}": round(value, 1) for name, value in low.items()}
    figures["ratio_to_fixmatch"] = round(low["shrinkmatch"] / low["fixmatch"], 4)
    return figures
