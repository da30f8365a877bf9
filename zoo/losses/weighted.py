"""Means over samples that count differently."""

from torch import Tensor

from zoo.core.distributed import mean_across_ranks


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    r""":math:`\sum_b w_b \ell_b / \sum_b w_b`; 0 where all weights are 0.

    The sum of the weights is that of all ranks: the mean over the ranks, which is what plain data parallelism makes of
    gradients, then equals one process on the joint batch.

    Args:
        losses: (B,).
        weights: (B,), not negative, without gradient.

    Returns:
        A scalar.
    """
    weights = weights.detach().to(losses.dtype)
    total = mean_across_ranks(weights.sum())
    return (weights * losses).sum() / total.clamp_min(1e-8)
