"""Similarities to labeled samples in a memory: the same for two views, and in line with the classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def inner_products(first: Tensor, second: Tensor) -> Tensor:
    r"""Products :math:`z_i^\top m_j` of the rows of (B, D) and (K, D) in at least 32 bits, under autocast too."""
    with torch.autocast(first.device.type, enabled=False):
        first, second = (x.float() if x.element_size() < 4 else x for x in (first, second))
        return first @ second.T


def similarities(features: Tensor, memory: Tensor, temperature: float) -> Tensor:
    r"""The distribution :math:`q_b = \mathrm{softmax}_k(z_b^\top m_k / t)` over the rows of a memory.

    Args:
        features: z (B, D), of length 1.
        memory: m (K, D), of length 1.
        temperature: t > 0.

    Returns:
        q (B, K), in at least 32 bits.

    Source: Zheng et al. 2022, arXiv 2203.06915, section 3.2.
    """
    return (inner_products(features, memory) / temperature).softmax(dim=1)


def unfold(instances: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    r"""Similarities scaled by how probable the class of each row is.

    .. math:: \hat q_{bk} = \frac{q_{bk}\, p_{b, y_k}}{\sum_j q_{bj}\, p_{b, y_j}}

    Args:
        instances: q (B, K).
        classes: p (B, C).
        labels: y (K,) of the rows.

    Returns:
        :math:`\hat q` (B, K), rows summing to 1.

    Source: Zheng et al. 2022, arXiv 2203.06915, section 3.3.
    """
    scaled = instances * classes[:, labels]
    return scaled / scaled.sum(dim=1, keepdim=True).clamp_min(torch.finfo(scaled.dtype).tiny)


def aggregate(instances: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Similarities summed by class, :math:`\sum_{k : y_k = c} q_{bk}`.

    Args:
        instances: q (B, K).
        labels: y (K,) of the rows.
        num_classes: C.

    Returns:
        (B, C), with the row sums of q.

    Source: Zheng et al. 2022, arXiv 2203.06915, section 3.3.
    """
    return instances.new_zeros(len(instances), num_classes).index_add_(1, labels, instances)


def instance_similarity_loss(features: Tensor, memory: Tensor, targets: Tensor, temperature: float) -> Tensor:
    r"""The strong view is as similar to the rows of the memory as the targets say.

    .. math:: L = -\tfrac1B \sum_b \sum_k \hat q_{bk} \log \mathrm{softmax}_k(z_b^\top m_k / t)

    Args:
        features: z (B, D), of length 1.
        memory: m (K, D), of length 1.
        targets: :math:`\hat q` (B, K), rows summing to 1; without a gradient.
        temperature: t > 0.

    Source: Zheng et al. 2022, arXiv 2203.06915, section 3.2.
    """
    logits = inner_products(features, memory) / temperature
    return cross_entropy(logits, targets.detach().to(logits.dtype))
