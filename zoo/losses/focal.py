"""The focal loss: cross-entropy that hardly counts what is already right."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    r""":math:`-\sum_c y_c (1 - p_c)^\gamma \log p_c`.

    Args:
        logits: (B, C).
        labels: (B,), or probabilities y (B, C).
        gamma: γ ≥ 0; 0 is the cross-entropy.

    Returns:
        (B,).

    Source: Lin et al. 2017, arXiv 1708.02002, equation 4, in its softmax form.
    """
    log_p = (logits if logits.element_size() >= 4 else logits.float()).log_softmax(dim=1)
    targets = one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels
    # 1 - p from log p without cancellation, and away from 0, where a power below 1 has no gradient
    rest = (-log_p.expm1()).clamp_min(1e-12)
    return -(targets * (rest**gamma if gamma else 1.0) * log_p).sum(dim=1)
