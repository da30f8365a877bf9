"""How often predictions waver between two classes."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.losses.entropy import entropy


def certainty_weights(logits: Tensor) -> Tensor:
    r"""How much each sample counts: more where its prediction is certain, 1 on average.

    .. math:: w_b = B\, \frac{1 + e^{-H(p_b)}}{\sum_i (1 + e^{-H(p_i)})}

    Args:
        logits: (B, C).

    Returns:
        w (B,), without a gradient.

    Source: Jin et al. 2020, arXiv 1912.03699, equation 5.
    """
    weights = 1 + (-entropy(logits.detach())).exp()
    return weights / weights.mean()


def class_confusion(logits: Tensor, temperature: float = 2.5) -> Tensor:
    r"""Minimum class confusion: the share of the confusion between classes that lies off the diagonal.

    .. math:: C = P^\top W P, \qquad
        L = \tfrac1K \sum_k \sum_{k' \ne k} \frac{C_{kk'}}{\sum_j C_{kj}}, \qquad P = \mathrm{softmax}(Z / T)

    It is :math:`1 - 1/K` where every prediction is uniform, and 0 where every one is certain. A class that no sample
    has any probability of counts 0. As the rows of P sum to 1, :math:`\sum_j C_{kj} = \sum_b w_b p_{bk}`.

    Args:
        logits: Z (B, K).
        temperature: T > 0.

    Returns:
        A scalar in [0, 1 - 1/K], in at least 32 bits.

    Source: Jin et al. 2020, arXiv 1912.03699, equations 2-7.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = (logits.float() if logits.element_size() < 4 else logits) / temperature
        p, weights = logits.softmax(dim=1), certainty_weights(logits)[:, None]
        mass = (weights * p).sum(dim=0)
        # Σ_b w p (1 - p) rather than mass - Σ w p²: without cancellation, 0 exactly where all are certain
        confused = (weights * p * (1 - p)).sum(dim=0)
        return (confused / mass.clamp_min(torch.finfo(p.dtype).tiny)).mean()
