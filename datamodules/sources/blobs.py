"""A synthetic source: for tests, smoke runs and timing, never for a claim."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from datamodules.sources.base import Samples, Source, TensorSamples
from datamodules.splits import generator
from zoo.core.errors import UserError


class Blobs(Source):
    """Each class is a smooth random pattern; a sample is its class's pattern, shifted in brightness, plus noise.

    Args:
        num_classes: number of classes.
        size: height and width.
        channels: 1 or 3.
        samples: training samples.
        test_samples: test samples.
        noise: standard deviation of the pixel noise, in grey levels; the patterns' own is about 50.
        shift: grey levels added to every pixel: a second domain is the same seed with another shift.
        seed: of patterns and samples.
    """

    flip = False

    def __init__(
        self,
        num_classes: int = 3,
        size: int = 8,
        channels: int = 1,
        samples: int = 120,
        test_samples: int = 30,
        noise: float = 30.0,
        shift: float = 0.0,
        seed: int = 0,
    ) -> None:
        if num_classes < 1 or samples < num_classes or test_samples < num_classes:
            raise UserError(
                f"Blobs: num_classes={num_classes}, samples={samples}, test_samples={test_samples}: "
                "at least one class and one sample of each are needed"
            )
        if channels not in (1, 3):
            raise UserError(f"Blobs: channels={channels} must be 1 or 3")
        self.classes = tuple(f"blob {label}" for label in range(num_classes))
        self.size = size
        self.channels = channels
        self.mean = (0.5,) * channels
        self.std = (0.25,) * channels
        self.samples = samples
        self.test_samples = test_samples
        self.noise = noise
        self.shift = shift
        self.seed = seed

    def _draw(self, count: int, purpose: int) -> Samples:
        coarse = torch.randn(self.num_classes, self.channels, 3, 3, generator=generator(self.seed))
        patterns = 128 + 60 * F.interpolate(coarse, (self.size, self.size), mode="bilinear", align_corners=True)
        stream = generator(self.seed, purpose)
        labels = torch.arange(count) % self.num_classes
        labels = labels[torch.randperm(count, generator=stream)]
        images = patterns[labels] + self.shift
        images = images + self.noise * torch.randn(images.shape, generator=stream)
        images = images + 10 * torch.randn(count, 1, 1, 1, generator=stream)
        return TensorSamples(images.round().clamp(0, 255).to(torch.uint8), labels)

    def train(self) -> Samples:
        """The training samples, with labels."""
        return self._draw(self.samples, 1)

    def test(self) -> Samples:
        """The test samples, with labels."""
        return self._draw(self.test_samples, 2)
