"""A source of two classes whose colour is a better cue than its shape, until the colour turns round."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from datamodules.sources.base import Samples, Source
from datamodules.sources.rotated import check_domain, part_name, pixels, share, with_images
from datamodules.sources.wrapped import WrappedSource
from datamodules.splits import generator
from datamodules.transforms import operations
from zoo.core.errors import UserError


class Colored(WrappedSource):
    r"""ColoredMNIST: two classes, a quarter of the labels wrong, and a colour that goes with the label.

    The label is 1 for the first half of the source's classes (digits below 5) and 0 for the others; with probability
    ``label_noise`` it is the other one. The colour is the label's, but with probability ``color_flip`` the other one:
    channel 0 holds the image for colour 0, channel 1 for colour 1, and the other is black.

    .. math:: y = \mathbb 1[c < C / 2] \oplus \mathrm{Bernoulli}(n), \qquad z = y \oplus \mathrm{Bernoulli}(e)

    Where e = 0.1 and 0.2 in training and 0.9 in the test, colour predicts at 0.85 in training and at 0.1 in the test,
    shape at 0.75 in both. Test labels are noisy, too: nothing that does not look at the colour gets above
    ``1 - label_noise``.

    Args:
        source: where the images come from; it holds them in memory. Coloured images are made grey first.
        color_flip: :math:`e \in [0, 1]`, the domain.
        label_noise: :math:`n \in [0, 1]`.
        channels: 2, as published, or 3, of which the last is black, for networks that want three.
        step: keeps every ``step``-th row and column: 2 gives the paper's 14 × 14.
        part: ``[i, n]`` keeps the i-th (from 0) of n disjoint shares of the training samples, as equal as can be in
            every class of the source. Samples keep their numbers. The test set is whole.
        seed: of shares, noise and colours; the same for all domains, or their shares overlap.

    Raises:
        UserError: for an argument out of its range; for texts, and for images that are read from files.

    Source: Arjovsky et al. 2019, arXiv 1907.02893, section 5.2; whole images as in DomainBed.
    """

    def __init__(
        self,
        source: Source,
        color_flip: float,
        label_noise: float = 0.25,
        channels: Literal[2, 3] = 2,
        step: int = 1,
        part: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        check_domain("Colored", source, part)
        for name, value in (("color_flip", color_flip), ("label_noise", label_noise)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"Colored: {name}={value} must lie in [0, 1]")
        if channels not in (2, 3):
            raise UserError(f"Colored: channels={channels} must be 2 or 3")
        if not 1 <= step <= source.size:
            raise UserError(f"Colored: step={step} must lie between 1 and the images' side, {source.size}")
        super().__init__(source)
        self.color_flip, self.label_noise, self.step = color_flip, label_noise, step
        self.part, self.seed = part, seed
        self.channels, self.size = channels, -(-source.size // step)
        # of a channel that holds the image in half of the samples
        mean, std = sum(source.mean) / len(source.mean), sum(source.std) / len(source.std)
        half = ((mean**2 + std**2) / 2 - mean**2 / 4) ** 0.5
        self.mean = (mean / 2, mean / 2, 0.0)[:channels]
        self.std = (half, half, 1.0)[:channels]

    @property
    def name(self) -> str:
        """The source's name with the domain and the share."""
        noise = f"{self.label_noise:.0%} label noise"
        return f"{self.source.name} in colour, {self.color_flip:.0%} flipped, {noise}{part_name(self.part)}"

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """The halves of the source's classes: the second half is class 0."""
        names = self.source.classes
        middle = (len(names) + 1) // 2
        return " or ".join(names[middle:]), " or ".join(names[:middle])

    def train(self) -> Samples:
        """The share of the training samples, coloured, with noisy labels."""
        return share_colored(self, self.source.train(), 13, self.part)

    def test(self) -> Samples:
        """All test samples, coloured, with noisy labels."""
        return share_colored(self, self.source.test(), 14, None)

    def unlabeled(self) -> Samples | None:
        """None: there is no colour without a label."""
        return None

    def labels_and_colors(self, labels: Tensor, purpose: int) -> tuple[Tensor, Tensor]:
        """Noisy labels and colours (N,) of samples of these classes (N,); unknown labels stay -1, of colour 0 or 1."""
        stream = generator(self.seed, purpose)
        noise, flips = torch.rand(2, len(labels), generator=stream)
        halves = labels < (len(self.source.classes) + 1) // 2
        binary = halves ^ (noise < self.label_noise)
        colors = binary ^ (flips < self.color_flip)
        return torch.where(labels >= 0, binary.long(), -1), colors.long()


def share_colored(source: Colored, samples: Samples, purpose: int, part: tuple[int, int] | None) -> Samples:
    """A share of the samples in their colours, drawn for all samples before they are shared out."""
    labels, colors = source.labels_and_colors(samples.labels, purpose)
    marked = share(samples.with_columns(_label=labels, _color=colors), part, source.seed)
    labels, colors = marked.columns.pop("_label"), marked.columns.pop("_color")
    grey = pixels("Colored", marked)[:, :, :: source.step, :: source.step]
    if grey.shape[1] == 3:
        grey = operations.luminance(grey).to(torch.uint8)
    shown = colors[:, None] == torch.arange(source.channels)
    return with_images(marked, grey * shown[:, :, None, None].to(torch.uint8), labels)
