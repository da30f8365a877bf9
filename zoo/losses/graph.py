"""Agreement of two graphs over a batch: of pseudo-labels, and of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.losses.similarity import inner_products, similarities


def pseudo_label_graph(probabilities: Tensor, threshold: float) -> Tensor:
    r"""Which samples should be near one another, judged by their pseudo-labels.

    .. math:: W_{ij} = \begin{cases} 1 & i = j \\ p_i^\top p_j & p_i^\top p_j \ge T \\ 0 & \text{otherwise} \end{cases}
        \qquad \hat W_{ij} = W_{ij} \Big/ \sum_k W_{ik}

    Args:
        probabilities: p (N, C), rows summing to 1.
        threshold: T, below which two samples are not connected. Above 1 only the loops are left.

    Returns:
        :math:`\hat W` (N, N), rows summing to 1, without a gradient.

    Source: Li, Xiong and Hoi 2021, arXiv 2011.11183, section 3.3.
    """
    p = probabilities.detach()
    similarity = inner_products(p, p)
    edges = similarity * (similarity >= threshold)
    loops = torch.eye(len(p), dtype=torch.bool, device=p.device)
    graph = edges.masked_fill(loops, 1.0)
    return graph / graph.sum(dim=1, keepdim=True)


def graph_contrastive_loss(first: Tensor, second: Tensor, graph: Tensor, temperature: float) -> Tensor:
    r"""The embedding graph of two views follows a target graph.

    .. math:: L = -\tfrac1N \sum_i \sum_j \hat W_{ij} \log
        \frac{\exp(z_i^\top z'_j / t)}{\sum_k \exp(z_i^\top z'_k / t)}

    The logarithm of the softmax is taken in one piece, so that nothing has to be added to it (the released code adds
    1e-7). With loops only this is the InfoNCE loss.

    Args:
        first: z (N, D), of length 1; half precision is widened.
        second: z' (N, D), of length 1.
        graph: :math:`\hat W` (N, N), rows summing to 1.
        temperature: t > 0.

    Source: Li, Xiong and Hoi 2021, arXiv 2011.11183, section 3.3.
    """
    logits = inner_products(first, second) / temperature
    return cross_entropy(logits, graph.to(logits.dtype))


def memory_smoothing(
    probabilities: Tensor,
    features: Tensor,
    memory_features: Tensor,
    memory_probabilities: Tensor,
    temperature: float,
    share: float | Tensor,
) -> Tensor:
    r"""Pseudo-labels averaged with those of similar samples in a memory.

    .. math:: \tilde p_b = \alpha\, p_b + (1 - \alpha) \sum_k a_{bk}\, q_k, \qquad
        a_b = \mathrm{softmax}_k(z_b^\top m_k / t)

    Args:
        probabilities: p (B, C).
        features: z (B, D), of length 1.
        memory_features: m (K, D), of length 1.
        memory_probabilities: q (K, C).
        temperature: t > 0.
        share: :math:`\alpha` in [0, 1], what is kept of p; 1 = no memory.

    Returns:
        :math:`\tilde p` (B, C), without a gradient.

    Source: Li, Xiong and Hoi 2021, arXiv 2011.11183, section 3.2.
    """
    near = inner_products(similarities(features.detach(), memory_features, temperature), memory_probabilities.T)
    return torch.lerp(near.to(probabilities.dtype), probabilities.detach(), share)
