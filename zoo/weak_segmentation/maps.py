"""From a tag classifier to masks: class activation maps and the rules that turn them into labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

UNLABELED = 255


def class_activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    r"""What every place adds to the logit of every class.

    .. math:: M_c(p) = \sum_d W_{cd} F_d(p), \qquad \tfrac1{hw}\sum_p M_c(p) = \text{logit}_c - b_c

    The second identity holds for a linear head on globally averaged features.

    Args:
        features: (B, D, h, w), the dense features before pooling.
        weight: (C, D), the linear head's weight.

    Returns:
        (B, C, h, w), of any sign.

    Raises:
        ValueError: when the head does not read as many features as the backbone gives.

    Source: Zhou et al. 2016, arXiv 1512.04150, section 2.
    """
    if weight.ndim != 2 or weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"class_activation_maps: weight has shape {tuple(weight.shape)}, but (classes, {features.shape[1]}) "
            f"is needed for features of shape {tuple(features.shape)}"
        )
    return torch.einsum("bdhw,cd->bchw", features, weight)


def normalize_maps(maps: Tensor, tags: Tensor | None = None) -> Tensor:
    r"""Positive evidence of every class, scaled to [0, 1] in every image; absent classes are zeroed.

    .. math:: \hat M_c = y_c\, \frac{M_c^+ - \min_p M_c^+}{\max_p (M_c^+ - \min_p M_c^+) + 10^{-5}}

    Args:
        maps: (B, C, H, W), of any sign.
        tags: (B, C) multi-hot y; without it no class is zeroed.

    Returns:
        (B, C, H, W) in [0, 1].

    Source: ToCo, arXiv 2303.01267 (the scaling of its maps).
    """
    maps = maps.relu()
    maps = maps - maps.amin((2, 3), keepdim=True)
    maps = maps / (maps.amax((2, 3), keepdim=True) + 1e-5)
    return maps if tags is None else maps * tags.to(maps.dtype)[:, :, None, None]


def multi_scale_maps(
    activate: Callable[[Tensor], Tensor], image: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False
) -> Tensor:
    """Add up a network's maps over image scales; at each scale keep the larger of the image's and its mirror's.

    Args:
        activate: (B, C, H, W) images to (B, K, h, w) maps.
        image: (B, ch, H, W).
        scales: factors of the image's size.
        flip: look at the mirrored image as well. Leave off where a mirrored object is another object (digits).

    Returns:
        (B, K, H, W), not negative.

    Raises:
        ValueError: without scales, or when one is not positive.

    Source: ToCo, arXiv 2303.01267.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"multi_scale_maps: scales={tuple(scales)!r}, but one or more positive numbers are needed")
    size = (image.shape[-2], image.shape[-1])
    total: Tensor | None = None
    for scale in scales:
        scaled = image
        if scale != 1.0:
            target = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(image, target, mode="bilinear", align_corners=False)
        maps = F.interpolate(activate(scaled), size, mode="bilinear", align_corners=False)
        if flip:
            mirrored = F.interpolate(activate(scaled.flip(-1)), size, mode="bilinear", align_corners=False)
            maps = torch.maximum(maps, mirrored.flip(-1))
        total = maps.relu() if total is None else total + maps.relu()
    assert total is not None
    return total


def pseudo_labels(scores: Tensor, low: float, high: float | None = None) -> Tensor:
    r"""Label pixels by their best class, leaving out those that are neither clearly object nor clearly background.

    .. math:: y(p) = \begin{cases} 1 + \arg\max_c s_c(p) & v(p) > h \\ 0 & v(p) \le l \\ 255 & \text{otherwise}
              \end{cases} \qquad v(p) = \max_c s_c(p)

    Args:
        scores: (B, C, H, W) of the foreground classes, absent ones at 0.
        low: l, up to which a pixel is background.
        high: h, above which a pixel is object; by default l, so that every pixel gets a label.

    Returns:
        (B, H, W) int64: 0 is background, c + 1 is class c, 255 is left out.

    Raises:
        ValueError: when ``high`` is below ``low``.

    Source: ToCo, arXiv 2303.01267 (its thresholds).
    """
    high = low if high is None else high
    if high < low:
        raise ValueError(f"pseudo_labels: high={high} is below low={low}, but it must be at least as large")
    value, best = scores.max(1)
    uncertain = torch.full_like(best, UNLABELED)
    return torch.where(value > high, best + 1, torch.where(value <= low, torch.zeros_like(best), uncertain))
