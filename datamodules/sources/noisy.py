"""A source whose training labels are partly wrong, in a known way."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from datamodules.sources.base import Samples, Source
from datamodules.sources.wrapped import WrappedSource, relabeled
from datamodules.splits import generator
from zoo.core.errors import UserError


class NoisyLabels(WrappedSource):
    r"""Flips a share of the training labels; test labels stay true.

    Args:
        source: where samples come from.
        rate: share :math:`\rho \in [0, 1]` of the labels that change, drawn sample by sample.
        kind: ``symmetric`` changes a label to any other class, each equally likely; ``asymmetric`` changes class c to
            c + 1, the last to the first, as a keyword that is wrong in the same way every time.
        seed: of the draw.

    Raises:
        UserError: for a rate outside [0, 1].
    """

    def __init__(
        self, source: Source, rate: float = 0.4, kind: Literal["symmetric", "asymmetric"] = "asymmetric", seed: int = 0
    ) -> None:
        if not 0.0 <= rate <= 1.0:
            raise UserError(f"NoisyLabels: rate={rate} must lie in [0, 1]")
        super().__init__(source)
        self.rate, self.kind, self.seed = rate, kind, seed

    @property
    def name(self) -> str:
        """The source's name with the noise."""
        return f"{self.source.name} with {self.rate:.0%} {self.kind} noise"

    def train(self) -> Samples:
        """The training samples with noisy labels."""
        samples = self.source.train()
        return relabeled(samples, flipped(samples.labels, self.num_classes, self.rate, self.kind, self.seed))


def flipped(labels: Tensor, num_classes: int, rate: float, kind: str, seed: int) -> Tensor:
    """Labels (N,) of which a share is wrong; -1 stays -1."""
    stream = generator(seed, 11)
    changed = torch.rand(len(labels), generator=stream) < rate
    step = torch.ones_like(labels)
    if kind == "symmetric":
        step = torch.randint(1, max(num_classes, 2), labels.shape, generator=stream)
    return torch.where(changed & (labels >= 0), (labels + step) % num_classes, labels)
