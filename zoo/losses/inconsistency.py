"""How differently the loss curves on two domains, seen through the gradients of a linear head."""

from __future__ import annotations

from torch import Tensor

from zoo.losses.head_gradients import head_gradient_moments, head_gradient_norms


def gradient_variance_gap(
    source: tuple[Tensor, Tensor], perturbed: tuple[Tensor, Tensor], labels: Tensor, bias: bool = True
) -> Tensor:
    r"""Mean squared distance of the variances of the head's gradients, of both domains from their average.

    .. math:: D_{var} = \tfrac12 \sum_{d \in \{s, t\}} \tfrac1P \lVert v_d - \bar v \rVert^2
        = \tfrac1{4P} \lVert v_s - v_t \rVert^2, \qquad
        v_d = \tfrac1B \sum_i (g_i^d - \bar g^s)^2

    Both are centred on the source's mean gradient :math:`\bar g^s`, as in the authors' code, so that a shifted mean is
    a difference too. P is the number of the head's parameters. The samples of all ranks count.

    Args:
        source: features (B, D) and logits (B, C) of the source samples.
        perturbed: those of the same samples perturbed, or of other samples with the same labels.
        labels: y (B,) int64.
        bias: whether the head has a bias.

    Returns:
        A scalar ≥ 0; 0 when both are alike.

    Source: Shin et al. 2024, arXiv 2403.07329, as in the authors' code; variances of gradients as in Fishr.
    """
    (mean, square), (other_mean, other_square) = (
        head_gradient_moments(*domain, labels) for domain in (source, perturbed)
    )
    gap = (square - other_square) - 2 * mean * (mean - other_mean)  # what squares of the centre there are cancels
    return (gap if bias else gap[:, :-1]).square().mean() / 4


def gradient_size(features: Tensor, logits: Tensor, labels: Tensor, bias: bool = True) -> Tensor:
    r"""Mean squared norm of the samples' gradients, for weight and bias each per entry.

    .. math:: D_{norm} = \tfrac1B \sum_i \Big( \tfrac{\lVert \delta_i h_i^\top \rVert^2}{C D}
        + \tfrac{\lVert \delta_i \rVert^2}{C} \Big)

    Args:
        features: h (B, D).
        logits: z (B, C).
        labels: y (B,) int64.
        bias: whether the head has a bias.

    Returns:
        A scalar ≥ 0; 0 where every sample is predicted with certainty and rightly.

    Source: as :func:`gradient_variance_gap`.
    """
    of_weight, of_bias = head_gradient_norms(features, logits, labels)
    classes, size = logits.shape[1], features.shape[1]
    return of_weight.mean() / (classes * size) + (of_bias.mean() / classes if bias else 0.0)
