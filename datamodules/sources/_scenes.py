"""Drawing of digit scenes, batched on tensors: textures, placement, composition."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_INK = 20  # MNIST scales its digits to 20 × 20 pixels in the middle of 28 × 28


def _uniform(stream: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=stream)


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours from hue, saturation and value, all (n,) in [0, 1], to (n, 3)."""
    sector = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] * 6) % 6
    ramp = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * ramp)


def textures(count: int, size: int, stream: torch.Generator) -> Tensor:
    """Backgrounds of four families: gratings, clouds, checkers and noisy gradients between two random colours.

    Returns:
        (count, 3, size, size) in [0, 1].
    """
    axis = torch.arange(size, dtype=torch.float32) / size
    angle = _uniform(stream, 0, 2 * math.pi, count, 1, 1)
    along = angle.cos() * axis[None, None, :] + angle.sin() * axis[None, :, None]
    across = angle.cos() * axis[None, :, None] - angle.sin() * axis[None, None, :]
    frequency = _uniform(stream, 3, 12, count, 1, 1)
    phase = _uniform(stream, 0, 2 * math.pi, count, 1, 1)
    grating = 0.5 + 0.5 * (2 * math.pi * frequency * along + phase).sin()
    checker = ((frequency * along).floor() + (frequency * across).floor()) % 2
    clouds = torch.zeros(count, size, size)
    for cells, weight in ((3, 0.5), (6, 0.3), (13, 0.2)):
        octave = torch.rand(count, 1, cells, cells, generator=stream)
        clouds += weight * F.interpolate(octave, (size, size), mode="bicubic", align_corners=False)[:, 0]
    clouds = (0.5 + 2 * (clouds - 0.5)).clamp(0, 1)
    gradient = (0.5 + 0.7 * along).clamp(0, 1) * 0.7 + 0.3 * torch.rand(count, size, size, generator=stream)
    family = torch.randint(4, (count,), generator=stream)
    mix = torch.stack([grating, clouds, checker, gradient], 1)[torch.arange(count), family][:, None]
    ends = [
        hsv_to_rgb(
            torch.rand(count, generator=stream),
            _uniform(stream, 0.0, 0.6, count),
            _uniform(stream, 0.1, 0.9, count),
        )[:, :, None, None]
        for _ in range(2)
    ]
    return ends[0] + (ends[1] - ends[0]) * mix


def _place(digit: Tensor, centre: Tensor, side: Tensor, size: int) -> Tensor:
    """Scale 28 × 28 digits (n, 1, 28, 28) to an ink box of ``side`` pixels around ``centre`` (x, y)."""
    width = side * (digit.shape[-1] / _INK)  # of the whole 28 × 28 picture
    theta = torch.zeros(len(digit), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = size / width
    theta[:, :, 2] = (size - 2 * centre) / width[:, None]
    grid = F.affine_grid(theta, [len(digit), 1, size, size], align_corners=False)
    return F.grid_sample(digit, grid, mode="bilinear", align_corners=False)


def _overlap(centre: Tensor, side: Tensor, other: Tensor, other_side: Tensor) -> Tensor:
    """Share of the smaller of two square boxes that the other covers: (n, k, 2), (n,), (n, 2), (n,) -> (n, k)."""
    reach = ((side + other_side)[:, None, None] / 2 - (centre - other[:, None]).abs()).clamp_min(0)
    smaller = torch.minimum(side, other_side)
    return (torch.minimum(reach, smaller[:, None, None])).prod(-1) / smaller.square()[:, None]


def draw_scenes(
    digits: Tensor,
    labels: Tensor,
    count: int,
    size: int,
    stream: torch.Generator,
    max_digits: int = 3,
    scale: tuple[float, float] = (0.36, 0.55),
    noise: float = 0.04,
    digit_texture: float = 0.0,
    num_classes: int = 10,
) -> tuple[Tensor, Tensor]:
    """Compose scenes of 1 to ``max_digits`` digits of different classes.

    A digit is placed where, of sixteen random places, it covers least of those already there; later ones lie on top.

    Args:
        digits: (n, 1, 28, 28) uint8.
        labels: (n,) classes of the digits.
        count: number of scenes.
        size: their side.
        stream: random numbers.
        max_digits: most digits in a scene.
        scale: range of a digit's height as a share of ``size``.
        noise: deviation of the pixel noise.
        digit_texture: strength in [0, 1] of a second colour's texture inside the digits.
        num_classes: number of digit classes.

    Returns:
        images (count, 3, size, size) uint8 and masks (count, size, size) uint8: 0 background, class + 1.
    """
    present = torch.arange(num_classes)[torch.bincount(labels, minlength=num_classes) > 0]
    max_digits = min(max_digits, len(present))
    # a random order of the classes per scene: the first max_digits are those that may appear
    order = present[torch.rand(count, len(present), generator=stream).argsort(1)]
    number = torch.randint(1, max_digits + 1, (count,), generator=stream)
    by_class = labels.argsort(stable=True)
    amount = torch.bincount(labels, minlength=num_classes)
    first = amount.cumsum(0) - amount

    image = textures(count, size, stream)
    mask = torch.zeros(count, size, size, dtype=torch.uint8)
    centres: list[Tensor] = []
    sides: list[Tensor] = []
    for slot in range(max_digits):
        label = order[:, slot]
        pick = (torch.rand(count, generator=stream) * amount[label]).long().minimum(amount[label] - 1)
        digit = digits[by_class[first[label] + pick]].float() / 255
        side = _uniform(stream, scale[0], scale[1], count) * size
        places = side[:, None, None] / 2 + torch.rand(count, 16, 2, generator=stream) * (size - side)[:, None, None]
        covered = torch.zeros(count, 16)
        for other, other_side in zip(centres, sides, strict=True):
            covered = torch.maximum(covered, _overlap(places, side, other, other_side))
        centre = places[torch.arange(count), covered.argmin(1)]
        centres.append(centre)
        sides.append(side)
        shape = _place(digit, centre, side, size)
        alpha = ((shape - 0.25) * 4).clamp(0, 1) * (number > slot).view(-1, 1, 1, 1)  # firm strokes with a soft edge
        hue = torch.rand(count, generator=stream)
        colour = hsv_to_rgb(hue, _uniform(stream, 0.7, 1.0, count), _uniform(stream, 0.75, 1.0, count))[
            :, :, None, None
        ]
        if digit_texture > 0:
            colour = colour + digit_texture * (textures(count, size, stream) - colour)
        image = image + alpha * (colour - image)
        mask = torch.where(alpha[:, 0] > 0.5, (label + 1).to(torch.uint8).view(-1, 1, 1), mask)
    image = image + noise * torch.randn(image.shape, generator=stream)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), mask
