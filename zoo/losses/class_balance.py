"""Predictions that together use every class."""

from __future__ import annotations

from torch import Tensor


def class_balance(probabilities: Tensor) -> Tensor:
    r"""Binary cross-entropy between the mean prediction and the uniform one, summed over classes.

    .. math:: R(\bar p) = -\sum_k \Big( \tfrac1K \log \bar p_k + (1 - \tfrac1K) \log (1 - \bar p_k) \Big), \qquad
        \bar p = \tfrac1B \sum_b p_b

    It is smallest where :math:`\bar p` is uniform. TLlib's is the mean over classes, 1/K of this.

    Args:
        probabilities: p (B, K).

    Returns:
        A scalar in at least 32 bits, finite also where a class has no probability.

    Source: French et al. 2018, arXiv 1706.05208, section 3.4; the sum over classes as in the authors' code.
    """
    mean = (probabilities.float() if probabilities.element_size() < 4 else probabilities).mean(dim=0)
    uniform, tiny = 1 / len(mean), 1e-30
    return -(uniform * mean.clamp_min(tiny).log() + (1 - uniform) * (1 - mean).clamp_min(tiny).log()).sum()
