"""Dice: one minus a soft F1 score, so that a crowd of easy negatives does not drown a rare class."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.core.distributed import sum_with_gradient


def dice_loss(
    probabilities: Tensor,
    targets: Tensor,
    smoothing: float = 1e-4,
    alpha: float = 0.0,
    square_denominator: bool = False,
    detach_factor: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    r"""One minus the Dice coefficient of each class, pooled over the batch.

    .. math:: L_c = 1 - \frac{2 \sum_b \tilde p_{bc} y_{bc} + \varepsilon}{\sum_b \tilde p_{bc} + \sum_b y_{bc}
        + \varepsilon}, \qquad \tilde p = (1 - p)^\alpha\, p

    α = 0 and ε = 0 give one minus the soft F1 score. With ``square_denominator`` the sums below are of squares. Sums
    run over all ranks, and the gradient is the one of the joint batch after ddp's mean.

    Args:
        probabilities: p (B, C).
        targets: y (B, C) in [0, 1].
        smoothing: ε ≥ 0.
        alpha: α ≥ 0: how much less sure predictions weigh. :math:`\tilde p` is largest at :math:`p = 1 / (1 + \alpha)`,
            so beyond that point the loss pulls a right prediction *back*, unless ``detach_factor``.
        square_denominator: as in V-Net.
        detach_factor: no gradient through :math:`(1 - p)^\alpha`; the released code has one.
        mask: (B,) of 0 and 1: which rows (tokens) count.

    Returns:
        (C,), each in [0, 1]. Without any row, 0 where ε > 0.

    Source: Li et al. 2020, arXiv 1911.02855, section 3; pooled as in the released code for two classes. For
    several, that code divides each sample's overlap by the sums of the whole batch, which is no Dice coefficient; this
    and its hard-example mining are not followed.
    """
    p, y = discounted(probabilities, alpha, detach_factor), targets.to(probabilities.dtype)
    if mask is not None:
        p, y = p * mask.unsqueeze(1), y * mask.unsqueeze(1)
    below = p.square() + y.square() if square_denominator else p + y
    overlap, total = sum_with_gradient(torch.stack([(p * y).sum(dim=0), below.sum(dim=0)]))
    return 1 - (2 * overlap + smoothing) / (total + smoothing)


def self_adjusting_dice_loss(
    probabilities: Tensor,
    targets: Tensor,
    smoothing: float = 1.0,
    alpha: float = 1.0,
    square_denominator: bool = False,
    detach_factor: bool = False,
) -> Tensor:
    r"""One minus a Dice coefficient for each sample and class.

    .. math:: L_{bc} = 1 - \frac{2 \tilde p_{bc} y_{bc} + \varepsilon}{\tilde p_{bc} + y_{bc} + \varepsilon},
        \qquad \tilde p = (1 - p)^\alpha\, p

    Args:
        probabilities: p (B, C).
        targets: y (B, C) in [0, 1].
        smoothing: ε > 0; with 0 a class that is neither there nor predicted is 0 / 0.
        alpha: α ≥ 0, see :func:`dice_loss`: a right prediction with :math:`p = 1` costs :math:`1 / (1 + \varepsilon)`
            for every α > 0.
        square_denominator: as in V-Net.
        detach_factor: no gradient through :math:`(1 - p)^\alpha`.

    Returns:
        (B, C).

    Source: Li et al. 2020, arXiv 1911.02855, section 3.3, the self-adjusting Dice loss (DSC).
    """
    p, y = discounted(probabilities, alpha, detach_factor), targets.to(probabilities.dtype)
    total = p.square() + y.square() if square_denominator else p + y
    return 1 - (2 * p * y + smoothing) / (total + smoothing)


def discounted(probabilities: Tensor, alpha: float, detach_factor: bool = False) -> Tensor:
    r""":math:`(1 - p)^\alpha p`, any shape; finite gradients also at p = 1 with α < 1, where the power has none."""
    if alpha == 0.0:
        return probabilities
    rest = (1 - probabilities).clamp_min(torch.finfo(probabilities.dtype).eps)
    factor = rest**alpha
    return (factor.detach() if detach_factor else factor) * probabilities
