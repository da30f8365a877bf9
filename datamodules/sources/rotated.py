"""A source whose images are turned: rotations are domains."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.sources.base import Samples, Source, TensorSamples
from datamodules.sources.wrapped import WrappedSource
from datamodules.splits import generator
from zoo.core.errors import UserError


class Rotated(WrappedSource):
    """A source with every image turned about its centre by one angle, bilinearly, with black corners.

    RotatedMNIST is six domains of 0, 15, 30, 45, 60 and 75 degrees that share no image: ``part: [0, 6]`` to ``[5, 6]``.

    Args:
        source: where the images come from; it holds them in memory.
        degrees: the angle, counter-clockwise.
        part: ``[i, n]`` keeps the i-th (from 0) of n disjoint shares of the training samples, as equal as can be in
            every class. Samples keep their numbers. The test set is whole: it shares no image with any training set.
        seed: of the shares; the same for all domains, or they overlap.

    Raises:
        UserError: for a ``part`` that is none; for texts, and for images that are read from files.

    Source: Ghifary et al. 2015, arXiv 1508.07680, section 4.1; shares as in DomainBed.
    """

    def __init__(self, source: Source, degrees: float, part: tuple[int, int] | None = None, seed: int = 0) -> None:
        check_domain("Rotated", source, part)
        super().__init__(source)
        self.degrees, self.part, self.seed = degrees, part, seed

    @property
    def name(self) -> str:
        """The source's name with the angle and the share."""
        return f"{self.source.name} at {self.degrees:g}°{part_name(self.part)}"

    def train(self) -> Samples:
        """The share of the training samples, turned."""
        return self._turned(share(self.source.train(), self.part, self.seed))

    def test(self) -> Samples:
        """All test samples, turned."""
        return self._turned(self.source.test())

    def unlabeled(self) -> Samples | None:
        """What the source brings without labels, turned."""
        samples = self.source.unlabeled()
        return None if samples is None else self._turned(samples)

    def _turned(self, samples: Samples) -> Samples:
        return with_images(samples, rotate(pixels("Rotated", samples), self.degrees))


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) turned counter-clockwise about their centre; multiples of 360 degrees change nothing."""
    from torchvision.transforms.functional import InterpolationMode
    from torchvision.transforms.functional import rotate as turn

    if degrees % 360 == 0 or not len(images):
        return images
    if degrees % 90 == 0 and images.shape[-1] == images.shape[-2]:
        return images.rot90(int(degrees) // 90, (-2, -1)).contiguous()
    return turn(images, degrees, interpolation=InterpolationMode.BILINEAR, fill=[0.0])


def share(samples: Samples, part: tuple[int, int] | None, seed: int) -> Samples:
    """The i-th of n disjoint shares of the samples, class by class, in the order of the set."""
    if part is None:
        return samples
    order = torch.randperm(len(samples), generator=generator(seed, 12))
    order = order[samples.labels[order].argsort(stable=True)]
    return samples.subset(order[part[0] :: part[1]].sort().values)


def part_name(part: tuple[int, int] | None) -> str:
    """A share as it stands in a source's name."""
    return "" if part is None else f" (part {part[0] + 1} of {part[1]})"


def check_domain(owner: str, source: Source, part: tuple[int, int] | None) -> None:
    """Refuse sources that cannot be changed in memory, and shares that are none.

    Raises:
        UserError: saying which.
    """
    if source.modality != "image" or source.streams:
        kind = f"has {source.modality}s" if source.modality != "image" else "reads its images from files"
        raise UserError(f"{owner}: source={source.name} {kind}; it must hold images in memory")
    if part is not None and not 0 <= part[0] < part[1]:
        raise UserError(f"{owner}: part={list(part)} must be [i, n] with 0 ≤ i < n")


def pixels(owner: str, samples: Samples) -> Tensor:
    """The images (N, C, H, W) of a set in memory."""
    if not isinstance(samples, TensorSamples):
        raise UserError(f"{owner}: the source's samples are {type(samples).__name__}; they must be images in memory")
    return samples.images


def with_images(samples: Samples, images: Tensor, labels: Tensor | None = None) -> TensorSamples:
    """The same samples with other images (N, C, H, W), and other labels (N,) where they are given."""
    return TensorSamples(images, samples.labels if labels is None else labels, samples.ids, samples.columns)
