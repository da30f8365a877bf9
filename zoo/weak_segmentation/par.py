r"""Pixel-adaptive refinement (PAR): score maps spread along pixels of like colour.

Written from the equations of Ru et al. 2022 (AFA, arXiv 2203.02664) with the constants that Ru et al. 2023
(ToCo, arXiv 2303.01267) use. Neighbours are read as shifted slices of one padded image, so the only tensor that grows
with their number n is the weight volume (B, n, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
_EPSILON = 1e-8


def neighbour_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (row, column) offsets of the eight directions at every dilation.

    Raises:
        ValueError: without dilations, or when one is below 1.
    """
    if not dilations or min(dilations) < 1:
        raise ValueError(f"neighbour_offsets: dilations={tuple(dilations)!r}, but one or more integers >= 1 are needed")
    return [(dilation * row, dilation * column) for dilation in dilations for row, column in _DIRECTIONS]


def _pad(x: Tensor, dilations: Sequence[int]) -> Tensor:
    return F.pad(x, [max(dilations)] * 4, mode="replicate")


def _neighbour(padded: Tensor, offset: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """View of the padded planes that lies ``offset`` away from every pixel."""
    row, column = (padded.shape[-2] - size[0]) // 2 + offset[0], (padded.shape[-1] - size[1]) // 2 + offset[1]
    return padded[..., row : row + size[0], column : column + size[1]]


def pixel_affinity(
    image: Tensor,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    position_weight: float = 0.01,
    bandwidth: float = 0.3,
) -> Tensor:
    r"""Weights between every pixel p and its 8 · len(dilations) neighbours q.

    .. math::
        w_{pq} = \operatorname{softmax}_q\Big[-\tfrac1{ch}\sum_{ch}\Big(\frac{|I_p - I_q|}{b\,\sigma_p}\Big)^2\Big]
               + \omega \operatorname{softmax}_q\Big[-\Big(\frac{|p - q|}{b\,\sigma_{pos}}\Big)^2\Big]

    σ_p is the unbiased deviation of the neighbours' colours per channel, σ_pos that of the n distances. Outside the
    image the border pixel is repeated.

    Args:
        image: (B, ch, H, W), any range: σ_p cancels the scale.
        dilations: distances at which the eight neighbours are taken; they may be larger than the image.
        position_weight: ω, weight of the position term.
        bandwidth: b.

    Returns:
        (B, n, H, W); the n weights of a pixel sum to 1 + ω.

    Source: AFA, arXiv 2203.02664; constants of ToCo, arXiv 2303.01267.
    """
    size = (image.shape[-2], image.shape[-1])
    offsets, padded = neighbour_offsets(dilations), _pad(image, dilations)
    views = [_neighbour(padded, offset, size) for offset in offsets]
    mean = torch.zeros_like(image)
    for view in views:
        mean = mean + view / len(views)
    variance = torch.zeros_like(image)
    for view in views:
        variance = variance + (view - mean).square() / (len(views) - 1)
    scale = 1.0 / ((variance.sqrt() + _EPSILON) * bandwidth)
    colour = torch.stack([-((image - view) * scale).square().mean(1) for view in views], 1).softmax(1)
    distances = torch.tensor(offsets, dtype=image.dtype, device=image.device).square().sum(1).sqrt()
    position = (-(distances / ((distances.std() + _EPSILON) * bandwidth)).square()).softmax(0)
    return colour + position_weight * position.view(1, -1, 1, 1)


def pixel_adaptive_refinement(
    maps: Tensor,
    image: Tensor,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    position_weight: float = 0.01,
    bandwidth: float = 0.3,
    present: Tensor | None = None,
) -> Tensor:
    r"""Spread score maps along pixels that look alike.

    .. math:: M^{t+1}_c(p) = \sum_q w_{pq} M^t_c(q)

    Linear in every plane, so planes refine independently. The weights sum to 1 + ω: a constant plane grows by
    :math:`(1 + ω)^T`. Compare planes with each other, or divide by that factor before a threshold.

    Args:
        maps: (B, K, h, w) scores; resized to the image when they are smaller.
        image: (B, ch, H, W) that the maps belong to.
        dilations: see :func:`pixel_affinity`.
        iterations: T; 0 returns the maps.
        position_weight: ω.
        bandwidth: b.
        present: (B, K) of planes that matter; the others are returned as zeros and cost nothing.

    Returns:
        (B, K, H, W).

    Raises:
        ValueError: when maps and image have different batch sizes, or ``iterations`` is negative.

    Source: AFA, arXiv 2203.02664; ToCo, arXiv 2303.01267.
    """
    if len(maps) != len(image):
        raise ValueError(f"pixel_adaptive_refinement: {len(maps)} maps for {len(image)} images; one for each is needed")
    if iterations < 0:
        raise ValueError(f"pixel_adaptive_refinement: iterations={iterations}, but it must be >= 0")
    if maps.shape[-2:] != image.shape[-2:]:
        maps = F.interpolate(maps, image.shape[-2:], mode="bilinear", align_corners=True)
    if present is not None:
        # images show few of the classes: refine as many planes as the fullest image has, then scatter them back
        width = int(present.sum(1).max()) if present.numel() else 0
        kept, order = present.bool().to(torch.int8).topk(width, dim=1)
        order = order.view(*order.shape, 1, 1).expand(-1, -1, *maps.shape[-2:])
        packed = maps.gather(1, order) * kept.to(maps.dtype).view(*kept.shape, 1, 1)
        refined = pixel_adaptive_refinement(packed, image, dilations, iterations, position_weight, bandwidth)
        return torch.zeros_like(maps).scatter(1, order, refined)
    if maps.shape[1] == 0 or iterations == 0:
        return maps
    weights = pixel_affinity(image.to(maps.dtype), dilations, position_weight, bandwidth)
    offsets, size = neighbour_offsets(dilations), (image.shape[-2], image.shape[-1])
    for _ in range(iterations):
        padded, maps = _pad(maps, dilations), torch.zeros_like(maps)
        for k, offset in enumerate(offsets):
            maps.addcmul_(weights[:, k : k + 1], _neighbour(padded, offset, size))
    return maps
