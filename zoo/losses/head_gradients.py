"""Gradients of every sample's loss with respect to a linear head, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from zoo.core.distributed import sum_with_gradient, world_size


def logit_gradients(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Gradient of the cross-entropy of every sample with respect to its logits.

    .. math:: \delta_i = p_i - e_{y_i}, \quad p_i = \mathrm{softmax}(z_i)

    With features h, of a linear head :math:`z = W h + b` the gradients are :math:`\delta_i h_i^\top` and
    :math:`\delta_i`, so that no sample has to be differentiated on its own.

    Args:
        logits: z (B, C); taken to 32 bits or more.
        labels: y (B,) int64.

    Returns:
        δ (B, C), whose rows sum to 0; gradient flows through p.
    """
    z = logits.float() if logits.element_size() < 4 else logits
    return z.softmax(dim=1) - one_hot(labels, z.shape[1]).to(z.dtype)


def head_gradient_norms(features: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""Squared norms of every sample's gradient with respect to weight and bias of a linear head.

    .. math:: \lVert \delta_i h_i^\top \rVert^2 = \lVert \delta_i \rVert^2 \lVert h_i \rVert^2, \qquad
        \lVert \delta_i \rVert^2

    Args:
        features: h (B, D).
        logits: z (B, C).
        labels: y (B,) int64.

    Returns:
        Of the weight (B,), of the bias (B,).
    """
    delta = logit_gradients(logits, labels)
    bias = delta.square().sum(dim=1)
    return bias * features.to(delta.dtype).square().sum(dim=1), bias


def head_gradient_moments(features: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""First and second moments over the samples of the gradients with respect to a linear head, entry by entry.

    .. math:: \tfrac1B \sum_i \delta_i \tilde h_i^\top, \qquad
        \tfrac1B \sum_i \delta_i^2 (\tilde h_i^2)^\top, \quad \tilde h = (h, 1)

    Two matrix products: the gradients (B, C, D) themselves are never made. The bias is the last column. The samples of
    all ranks count.

    Args:
        features: h (B, D).
        logits: z (B, C).
        labels: y (B,) int64.

    Returns:
        Mean and mean square, each (C, D + 1).
    """
    delta = logit_gradients(logits, labels)
    h = features.to(delta.dtype)
    h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
    with torch.autocast(h.device.type, enabled=False):
        moments = torch.stack([delta.T @ h, delta.square().T @ h.square()]) / len(h)
    mean, square = sum_with_gradient(moments) / world_size()
    return mean, square
