"""Convex combinations of samples, and of their targets."""

import torch
from torch import Tensor


def mixing_shares(count: int, alpha: float, dominant: bool = True) -> Tensor:
    r"""One share for every sample.

    .. math:: \lambda \sim \mathrm{Beta}(\alpha, \alpha), \quad \lambda' = \max(\lambda, 1 - \lambda)

    Args:
        count: B.
        alpha: α ≥ 0; 0 is its limit :math:`\lambda' = 1`, nothing is mixed.
        dominant: return λ', so that a mixed sample stays nearest to its first part, rather than λ.

    Returns:
        (B,) on the CPU, drawn from torch's default generator.

    Source: Zhang et al. 2018, arXiv 1710.09412; Berthelot et al. 2019, arXiv 1905.02249, equations 8 and 9.
    """
    if alpha <= 0.0:
        return torch.ones(count)
    # a ratio of two Gamma(α) draws, by their logarithms: for small α both underflow, and torch's own Beta gives 1/2
    draws = torch.distributions.Gamma(alpha + 1.0, 1.0).sample((2, count)).log()
    draws = draws - torch.empty(2, count).exponential_() / alpha
    lam = torch.sigmoid(draws[0] - draws[1])
    return torch.maximum(lam, 1.0 - lam) if dominant else lam


def mix(x: Tensor, targets: Tensor, lam: Tensor | float, permutation: Tensor) -> tuple[Tensor, Tensor]:
    r"""Every sample with another one, and the targets alike.

    .. math:: x'_b = \lambda_b x_b + (1 - \lambda_b) x_{\sigma(b)}, \quad
        t'_b = \lambda_b t_b + (1 - \lambda_b) t_{\sigma(b)}

    Args:
        x: (B, ...), floating point.
        targets: t (B, C), probabilities.
        lam: λ in [0, 1], one for all or (B,).
        permutation: σ (B,).

    Returns:
        x' and t', of the given shapes.

    Source: Zhang et al. 2018, arXiv 1710.09412, equation 1; Berthelot et al. 2019, arXiv 1905.02249, equations 10, 11.
    """

    def combine(values: Tensor) -> Tensor:
        share = lam if isinstance(lam, float | int) else lam.to(values).reshape(-1, *[1] * (values.ndim - 1))
        return torch.lerp(values[permutation], values, share)

    return combine(x), combine(targets)


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    r"""Predictions of lower entropy.

    .. math:: \mathrm{sharpen}(p, T)_c = p_c^{1/T} \big/ \textstyle\sum_j p_j^{1/T}

    T = 1 changes nothing, T → 0 leaves the most probable class, T → ∞ every class that is possible at all alike.

    Args:
        probabilities: p (B, C).
        temperature: T > 0.

    Raises:
        ValueError: if T is not positive.

    Source: Berthelot et al. 2019, arXiv 1905.02249, equation 7.
    """
    if temperature <= 0.0:
        raise ValueError(f"sharpen: temperature={temperature} must be positive")
    return (probabilities.log() / temperature).softmax(dim=1)
