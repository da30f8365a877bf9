"""The style of an image, as mean and standard deviation of its feature maps."""

from __future__ import annotations

import torch
from torch import Tensor


def mix_styles(x: Tensor, share: Tensor, partners: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Feature maps with a style between their own and another sample's.

    .. math:: x'_i = \bar\sigma_i \frac{x_i - \mu_i}{\sigma_i} + \bar\mu_i, \qquad
        \bar\mu_i = \lambda_i \mu_i + (1 - \lambda_i) \mu_{\pi(i)}, \quad
        \bar\sigma_i = \lambda_i \sigma_i + (1 - \lambda_i) \sigma_{\pi(i)}

    Mean and standard deviation are those of each sample's channels over their positions, with n - 1 in the denominator
    as in the authors' code; no gradient flows through them. With λ = 1, or itself as the partner, a sample stays
    exactly what it is. Of one position only the mean is mixed.

    Args:
        x: maps (B, C, H, W), or positions (B, N, C) of a transformer.
        share: λ in [0, 1] (B,).
        partners: π (B,) int64.
        eps: added to the variance.

    Returns:
        Of the shape and type of x.

    Source: Zhou et al. 2021, arXiv 2104.02008, equations 3-6.
    """
    positions = (2, 3) if x.ndim == 4 else (1,)
    values = x.float() if x.element_size() < 4 else x
    several = int(values[0, 0].numel() > 1) if x.ndim == 4 else int(x.shape[1] > 1)
    variance, mean = torch.var_mean(values.detach(), dim=positions, correction=several, keepdim=True)
    deviation = (variance + eps).sqrt()
    share = share.to(values).view(-1, *[1] * (x.ndim - 1))
    new_mean, new_deviation = (torch.lerp(own[partners], own, share) for own in (mean, deviation))
    ratio = new_deviation / deviation
    return (values * ratio + (new_mean - ratio * mean)).to(x.dtype)  # in this form exactly x where the style is its own
