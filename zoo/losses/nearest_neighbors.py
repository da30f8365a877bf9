"""Leave-one-out nearest neighbours as a loss: a class may be several clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.losses.similarity import inner_products


def nearest_neighbor_loss(
    queries: Tensor,
    labels: Tensor,
    memory: Tensor,
    memory_labels: Tensor,
    neighbors: int = 200,
    temperature: float = 0.1,
    excluded: Tensor | None = None,
) -> Tensor:
    r"""The weighted k-nearest-neighbour classifier that leaves its own sample out.

    .. math:: L_i = -\log \frac{\sum_{j \in N_k(i), y_j = y_i} e^{s_{ij} / \sigma}}
        {\sum_{j \in N_k(i)} e^{s_{ij} / \sigma}}

    :math:`s` are inner products, cosines where the features are unit vectors, and :math:`N_k(i)` are the k memory rows
    of largest s. A gradient reaches these only, so samples of a class far away are not drawn near. Where none of the k
    is of the right class, the nearest row that is joins them: the loss is finite and pulls towards it. With all rows as
    neighbours it is the loss of neighbourhood components analysis.

    Args:
        queries: features (B, D), which learn.
        labels: y (B,).
        memory: features (K, D); a gradient reaches them too, unless they have none.
        memory_labels: (K,); rows of a negative label are empty and nobody's neighbours.
        neighbors: k ≥ 1; all rows where there are fewer.
        temperature: σ > 0.
        excluded: (B, K) boolean, true for rows that are the query's own sample.

    Returns:
        (B,); 0 where no row is of the query's class, and where there are no rows.

    Raises:
        UserError: if ``neighbors`` or ``temperature`` is out of range.

    Source: Feng et al. 2022, arXiv 2110.06014, section 3; what to do without a right neighbour is our choice.
    """
    if neighbors < 1 or temperature <= 0:
        raise UserError(
            f"nearest_neighbor_loss: neighbors={neighbors} must be at least 1 and temperature={temperature} positive"
        )
    if not len(memory):
        return queries.sum(dim=1) * 0
    queries = queries.float() if queries.element_size() < 4 else queries
    similarity = inner_products(queries, memory.to(queries.dtype)) / temperature
    usable = (memory_labels >= 0).expand_as(similarity)
    if excluded is not None:
        usable = usable & ~excluded
    lowest = torch.finfo(similarity.dtype).min
    similarity = similarity.masked_fill(~usable, lowest)
    right = usable & (labels.unsqueeze(1) == memory_labels)

    # The k nearest, and the nearest right one, which changes nothing where it is among them.
    nearest = similarity.detach().topk(min(neighbors, len(memory)), dim=1).indices
    nearest_right = similarity.detach().masked_fill(~right, lowest).argmax(dim=1, keepdim=True)
    near = torch.zeros_like(usable).scatter(1, nearest, True)
    near = (near & usable) | (right & torch.zeros_like(usable).scatter(1, nearest_right, True))

    known = right.any(dim=1)
    own = similarity.masked_fill(~(near & right), lowest).logsumexp(dim=1)
    every = similarity.masked_fill(~near, lowest).logsumexp(dim=1)
    return torch.where(known, every - own, torch.zeros_like(own))
