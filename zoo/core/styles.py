"""What feature maps look like but for what they show: the mean and standard deviation of every channel."""

from torch import Tensor


def mix_styles(maps: Tensor, partners: Tensor, shares: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Every sample's features in a style between its own and its partner's.

    .. math:: \tilde x_i = \sigma_{mix} \frac{x_i - \mu_i}{\sigma_i} + \mu_{mix}, \quad
        \mu_{mix} = \lambda_i \mu_i + (1 - \lambda_i) \mu_{j(i)}, \quad
        \sigma_{mix} = \lambda_i \sigma_i + (1 - \lambda_i) \sigma_{j(i)}

    Means and standard deviations are over a sample's positions, channel by channel, and constants to the gradient. With
    λ = 1, or itself as the partner, a sample stays exactly what it is.

    Args:
        maps: x (B, C, H, W), or tokens (B, N, C).
        partners: j (B,), row numbers.
        shares: λ (B,) in [0, 1].
        eps: added to variances (biased ones: they are ratios here).

    Returns:
        As ``maps``.

    Source: Zhou et al. 2021, arXiv 2104.02008, equations 4-6.
    """
    x = maps.float() if maps.element_size() < 4 else maps
    positions = (2, 3) if maps.dim() == 4 else (1,)
    mean = x.detach().mean(positions, keepdim=True)
    std = (x.detach().var(positions, correction=0, keepdim=True) + eps).sqrt()
    share = shares.to(x).view(-1, *[1] * (x.dim() - 1))
    mixed_mean, mixed_std = (own[partners].lerp(own, share) for own in (mean, std))
    ratio = mixed_std / std
    return (x * ratio + (mixed_mean - ratio * mean)).to(maps.dtype)  # in this form exactly x where the style is x's own
