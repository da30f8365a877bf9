"""Predictions that neglect no class."""

import torch
from torch import Tensor

from zoo.core.distributed import sum_with_gradient

SMALLEST = 1e-12


def fairness_loss(logits: Tensor, weights: Tensor, mean: Tensor, histogram: Tensor) -> Tensor:
    r"""Self-adaptive fairness: the mean prediction follows the expected one, both divided by how often each class wins.

    .. math:: L_f = -H\!\left(\mathrm{SumNorm}\frac{\tilde p}{\tilde h},\;
        \mathrm{SumNorm}\frac{\bar p}{\bar h}\right), \quad
        \bar p = \sum_b w_b\, p_b, \quad \bar h = \sum_b w_b\, e_{\arg\max p_b}, \quad H(a, b) = -\sum_c a_c \log b_c

    The sums run over the batches of all ranks; averaged over ranks the gradient is that of one process on the joint
    batch. Classes that nothing is predicted as take no part. Without any weight the loss and its gradient are 0.

    Args:
        logits: of the strong views (B, C); gradients flow here.
        weights: w (B,), 0 where a sample is left out.
        mean: p̃ (C,), the running mean prediction.
        histogram: h̃ (C,), the running shares of the predicted classes.

    Returns:
        A scalar, never positive; it is minimised, as in the paper and its code.

    Source: Wang et al. 2023, arXiv 2205.07246, equations 9 to 11.
    """
    probabilities = (logits.float() if logits.element_size() < 4 else logits).softmax(dim=1)
    weights = weights.to(probabilities.dtype)
    label = probabilities.detach().argmax(dim=1)
    counts = torch.zeros_like(probabilities[0]).scatter_add(0, label, weights)
    sums, counts = sum_with_gradient(
        torch.stack([(weights[:, None] * probabilities).sum(dim=0), counts.detach()])
    ).unbind()
    expected = _normalized(mean.to(sums.dtype) * _inverse(histogram.to(sums.dtype)))
    observed = _normalized(sums * _inverse(counts.detach()))
    return (expected * (observed + SMALLEST).log()).sum() * (counts.detach().sum() > 0)


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x > 0, 1.0 / torch.where(x > 0, x, 1.0), 0.0)


def _normalized(x: Tensor) -> Tensor:
    """Scaled to sum to 1."""
    return x / x.sum().clamp_min(SMALLEST)
