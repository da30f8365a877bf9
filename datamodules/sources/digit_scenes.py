"""Digits on textures: many-label images whose exact masks are known."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.sources._scenes import draw_scenes
from datamodules.sources.base import Samples, Source, TensorSamples
from datamodules.sources.digits import MNIST5k
from datamodules.splits import generator
from zoo.core.errors import UserError

_CHUNK = 250  # scenes drawn at a time; always whole chunks, so that fewer scenes are the first ones of more


def tags_of(masks: Tensor, num_classes: int, min_pixels: int = 1) -> Tensor:
    """Which classes a mask shows: (N, H, W) of 0 background, c + 1 class, 255 not labelled, to (N, C) multi-hot."""
    if masks.numel() == 0:
        return torch.zeros(len(masks), num_classes)
    shown = [(masks == label + 1).flatten(1).sum(1) >= min_pixels for label in range(num_classes)]
    return torch.stack(shown, 1).float()


class DigitScenes(Source):
    """One to three MNIST digits of different classes on a procedural texture, with tags and exact masks.

    Digits differ in scale, place and colour; a later one may cover an earlier one a little. Training scenes show the
    4,000 training digits of :class:`MNIST5k`, test scenes its 1,000 test digits. Samples carry ``tags`` (10,), the
    digits of which at least 20 pixels are seen, and ``mask`` (H, W) uint8: 0 is background, digit + 1 a digit.

    The uniform colour of a stroke flatters refinement by colour: raise ``digit_texture`` for a harder task.

    Args:
        train_scenes: number of training scenes.
        test_scenes: number of test scenes.
        size: height and width, at least 16.
        max_digits: most digits in a scene, 1 to 10.
        scale: range of a digit's height, as a share of ``size``, within (0, 1].
        noise: deviation of the pixel noise, pixels in 0..1.
        digit_texture: strength in [0, 1] of a texture inside the digits.
        seed: of all that is random.

    Raises:
        ValueError: when a number is out of range.
    """

    classes = tuple(str(digit) for digit in range(10))
    channels = 3
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    flip = False

    def __init__(
        self,
        train_scenes: int = 2000,
        test_scenes: int = 300,
        size: int = 64,
        max_digits: int = 3,
        scale: tuple[float, float] = (0.36, 0.55),
        noise: float = 0.04,
        digit_texture: float = 0.0,
        seed: int = 0,
    ) -> None:
        for name, value, low, high in (
            ("train_scenes", train_scenes, 1, float("inf")),
            ("test_scenes", test_scenes, 1, float("inf")),
            ("size", size, 16, float("inf")),
            ("max_digits", max_digits, 1, 10),
            ("noise", noise, 0, float("inf")),
            ("digit_texture", digit_texture, 0, 1),
        ):
            if not low <= value <= high:
                most = f" and at most {high}" if high < float("inf") else ""
                raise UserError(f"DigitScenes: {name}={value} must be at least {low}{most}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"DigitScenes: scale={tuple(scale)} must be an increasing range within (0, 1]")
        self.train_scenes = train_scenes
        self.test_scenes = test_scenes
        self.size = size
        self.max_digits = max_digits
        self.scale = (float(scale[0]), float(scale[1]))
        self.noise = noise
        self.digit_texture = digit_texture
        self.seed = seed
        self._drawn: dict[str, TensorSamples] = {}

    def train(self) -> Samples:
        """The training scenes; drawn once."""
        return self._draw("train", self.train_scenes)

    def test(self) -> Samples:
        """The test scenes, of digits that no training scene shows; drawn once."""
        return self._draw("test", self.test_scenes)

    def _draw(self, part: str, count: int) -> TensorSamples:
        if part not in self._drawn:
            digits = MNIST5k().train() if part == "train" else MNIST5k().test()
            pixels, labels = digits.images_at(torch.arange(len(digits))), digits.labels
            stream = generator(self.seed, 0 if part == "train" else 1)
            style = (self.max_digits, self.scale, self.noise, self.digit_texture)
            chunks = [
                draw_scenes(pixels, labels, _CHUNK, self.size, stream, *style) for _ in range(-(-count // _CHUNK))
            ]
            images, masks = (torch.cat(tensors)[:count] for tensors in zip(*chunks, strict=True))
            # no sample has one label: -1, and the truth is in the columns
            columns = {"tags": tags_of(masks, self.num_classes, min_pixels=20), "mask": masks}
            self._drawn[part] = TensorSamples(images, torch.full((count,), -1), columns=columns)
        return self._drawn[part]
