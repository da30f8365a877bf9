"""Two batches of images into one: blended pixel by pixel, or with boxes of the other pasted in."""

from __future__ import annotations

import torch
from torch import Tensor


def blend(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    r"""Mixup of two batches, with a share of its own for every sample.

    .. math:: \tilde x = \lambda x + (1 - \lambda) x'

    Args:
        x: (B, ...).
        other: :math:`x'`, same shape.
        share: :math:`\lambda` (B,) or (1,).

    Source: Zhang et al. 2018, arXiv 1710.09412.
    """
    return torch.lerp(other, x, share.to(x).reshape(-1, *[1] * (x.ndim - 1)))


def boxes(share: Tensor, size: int, height: int, width: int) -> Tensor:
    r"""Random boxes of :math:`1 - \lambda` of the area, cut at the border.

    .. math:: r_w = W \sqrt{1 - \lambda}, \quad r_h = H \sqrt{1 - \lambda}, \quad
              r_x \sim \mathcal U(0, W), \; r_y \sim \mathcal U(0, H)

    Args:
        share: :math:`\lambda` (B,), or (1,) for one box in all samples.
        size: B.
        height: H.
        width: W.

    Returns:
        Masks (B, 1, H, W), true inside; the centres are drawn from torch's default CPU generator.

    Source: Yun et al. 2019, arXiv 1905.04899, equation 2; sides are rounded down to whole pixels on both sides of the
    centre, as the released code does.
    """
    count = len(share)
    centres = (torch.rand(count, 2) * torch.tensor([height, width])).floor().to(share.device, non_blocking=True)
    cut = (1 - share.float()).sqrt()

    def inside(length: int, centre: Tensor) -> Tensor:
        half = ((length * cut).floor() / 2).floor()
        pixels = torch.arange(length, device=share.device)
        return (pixels >= (centre - half).unsqueeze(1)) & (pixels < (centre + half).unsqueeze(1))

    rows, columns = inside(height, centres[:, 0]), inside(width, centres[:, 1])
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1).expand(size, 1, height, width)


def cutmix(x: Tensor, other: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    r"""Boxes of other images pasted in.

    .. math:: \tilde x = M \odot x + (1 - M) \odot x'

    Args:
        x: (B, C, H, W).
        other: :math:`x'`, same shape.
        share: the wanted shares :math:`\lambda` (B,), or (1,) for one box in all samples.

    Returns:
        The mixed images, and the shares (B,) of x that are left in them, exactly.

    Source: Yun et al. 2019, arXiv 1905.04899, equations 1 and 2.
    """
    pasted = boxes(share, len(x), x.shape[-2], x.shape[-1])
    return torch.where(pasted, other, x), 1 - pasted.float().mean(dim=(1, 2, 3))
