"""What predictions say about samples: each much, all together of every class."""

from __future__ import annotations

from torch import Tensor

from zoo.losses.entropy import entropy


def marginal_entropy(probabilities: Tensor, epsilon: float = 0.0) -> Tensor:
    r"""Entropy of the mean prediction, :math:`H(\bar p) = -\sum_c \bar p_c \log(\bar p_c + \varepsilon)`.

    Args:
        probabilities: p (B, C).
        epsilon: ε ≥ 0; with 0 a class without probability counts 0.

    Returns:
        A scalar, at most log C.
    """
    mean = (probabilities.float() if probabilities.element_size() < 4 else probabilities).mean(dim=0)
    tiny = 1e-30 if epsilon == 0.0 else 0.0
    return -(mean * (mean + epsilon).clamp_min(tiny).log()).sum()


def information_maximization(logits: Tensor, epsilon: float = 0.0, diversity: float = 1.0) -> Tensor:
    r"""Predictions that are certain one by one and diverse together: minus their mutual information with the sample.

    .. math:: L = \tfrac1B \sum_b H(p_b) - \lambda H(\bar p), \qquad \bar p = \tfrac1B \sum_b p_b

    Args:
        logits: (B, C).
        epsilon: ε inside both logarithms: 1e-5 in SHOT's code; 0 is exact.
        diversity: λ ≥ 0; 0 leaves the entropy alone, as SHOT does where the target lacks classes.

    Returns:
        A scalar, at least -λ log C, in at least 32 bits.

    Source: Liang et al. 2020, arXiv 2002.08546, equation 3.
    """
    p = (logits.float() if logits.element_size() < 4 else logits).softmax(dim=1)
    certainty = -(p * (p + epsilon).log()).sum(dim=1) if epsilon else entropy(logits)
    return certainty.mean() - diversity * marginal_entropy(p, epsilon)
