"""Labels of one set predicted from those of another, in closed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kernel_ridge(known: Tensor, values: Tensor, asked: Tensor, ridge: float = 1e-3) -> Tensor:
    r"""Kernel ridge regression with the cosine kernel.

    .. math:: \hat v = K_{an} (K_{nn} + \lambda I)^{-1} v, \qquad K_{ij} = \cos(f_i, f_j)

    Args:
        known: features (N, D) whose values are known.
        values: v (N, C).
        asked: features (A, D).
        ridge: λ > 0. 32 bits bear 1e-3 up to a few hundred samples.

    Returns:
        :math:`\hat v` (A, C), differentiable in all features, in at least 32 bits.
    """
    with torch.autocast(known.device.type, enabled=False):
        known, asked = (F.normalize(x.float() if x.element_size() < 4 else x, dim=1) for x in (known, asked))
        gram = known @ known.T + ridge * torch.eye(len(known), dtype=known.dtype, device=known.device)
        factor = torch.linalg.cholesky_ex(gram).L  # without waiting for the device to say that it worked
        return asked @ known.T @ torch.cholesky_solve(values.to(known.dtype), factor)


def reverse_loss(
    source: Tensor, labels: Tensor, target: Tensor, pseudo_labels: Tensor, num_classes: int, ridge: float = 1e-3
) -> Tensor:
    r"""How badly a classifier that was fitted to the target's pseudo-labels does on the source.

    .. math:: L = \tfrac{1}{N_s C} \lVert K_{st} (K_{tt} + \lambda I)^{-1} (\hat Y_t - \tfrac1C) - (Y_s - \tfrac1C)
        \rVert_F^2

    Small for features in which target and source samples of a class are alike, and pseudo-labels that are right.

    Args:
        source: features (N_s, D).
        labels: (N_s,).
        target: features (N_t, D).
        pseudo_labels: (N_t,).
        num_classes: C.
        ridge: λ > 0.

    Returns:
        A scalar, with gradients in both features.

    Source: Liu et al. 2021, arXiv 2103.03571, equations 2-4; kernel, centring and mean as in the authors' code.
    """
    dtype = torch.promote_types(source.dtype, torch.float32)
    truth, guesses = (F.one_hot(y, num_classes).to(dtype) - 1 / num_classes for y in (labels, pseudo_labels))
    return (kernel_ridge(target, guesses, source, ridge) - truth).square().mean()
