"""Labels that are released little by little."""

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.distributed import mean_across_ranks, world_size


def annealing_threshold(progress: float, num_classes: int, schedule: Literal["linear", "log", "exp"]) -> float:
    r"""How sure of its label a sample may be and still be learned from.

    .. math:: \eta_t = \alpha_t \left(1 - \tfrac1C\right) + \tfrac1C, \quad \alpha_t \in
        \{t \;(\text{linear}),\; 1 - e^{-5t} \;(\text{log}),\; e^{5(t - 1)} \;(\text{exp})\}

    Args:
        progress: t in [0, 1].
        num_classes: C.
        schedule: log releases the labels early, exp late (for few labels).

    Source: Xie et al. 2020, arXiv 1904.12848: training signal annealing.
    """
    alpha = {"linear": progress, "log": 1.0 - math.exp(-5.0 * progress), "exp": math.exp(5.0 * (progress - 1.0))}
    return alpha[schedule] * (1.0 - 1.0 / num_classes) + 1.0 / num_classes


def annealed_cross_entropy(logits: Tensor, labels: Tensor, threshold: float, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy over the samples that are not yet too sure of their label.

    .. math:: L = \frac{1}{\max(Z, 1)} \sum_b \mathbb 1[p_{y_b}(x_b) \le \eta]\, H(y_b, p(x_b)), \quad
        Z = \sum_b \mathbb 1[p_{y_b}(x_b) \le \eta]

    :math:`Z` is of all ranks, so that the losses of the ranks average to that of the joint batch.

    Args:
        logits: (B, C).
        labels: (B,).
        threshold: η, 1 keeps everything.
        label_smoothing: as in torch's ``cross_entropy``.

    Source: Xie et al. 2020, arXiv 1904.12848: training signal annealing, and its image code; USB divides by B.
    """
    logits = logits.float() if logits.element_size() < 4 else logits
    correct = logits.detach().softmax(dim=1).gather(1, labels[:, None])[:, 0]
    kept = (correct <= threshold).to(logits.dtype)
    losses = cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return mean_of_kept(losses, kept)


def mean_of_kept(losses: Tensor, weights: Tensor) -> Tensor:
    r"""Weighted mean :math:`\sum_b w_b l_b / \max(\sum_b w_b, 1)`; the denominator is of all ranks.

    Args:
        losses: l (B,).
        weights: w (B,) in [0, 1].
    """
    kept = mean_across_ranks(weights.sum()).clamp_min(1.0 / world_size())
    return (weights * losses).sum() / kept
