r"""Transductive few-shot classification as constrained clustering, for many tasks at once.

.. math:: E(Z, m) = \sum_p \sum_k z_{pk}\, d(x_p, m_k) + t \sum_p \sum_k z_{pk} \log z_{pk}
    - \tfrac{\lambda}{2} \sum_{p, q} w_{pq}\, z_p^\top z_q

over assignments :math:`z_p` in the simplex, those of the support samples being fixed to their labels, and prototypes
:math:`m`. Both blocks are minimised in turn and :math:`E` never rises:

- assignments: :math:`z_p \propto \exp((-d_p + \lambda \sum_q w_{pq} z_q) / t)`, all at once, repeated: a bound on
  :math:`E`, because :math:`-z^\top W z` is concave once :math:`W` is positive semi-definite;
- prototypes: the mean (K-means), a step of mean shift (K-modes) or the best sample (medoids).

Source: Ziko et al. 2021, "Transductive Few-Shot Learning: Clustering is All You Need?", arXiv 2106.09516. Their code
makes the same assignments, but lets support samples change theirs after the first update and uses an affinity that is
neither symmetric nor positive semi-definite, so that its objective may rise: ``affinity(..., convex=False)`` and
``clamp="start"`` follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UserError

Prototype = Literal["mean", "mode", "medoid"]


def affinity(features: Tensor, neighbors: int = 3, convex: bool = True) -> Tensor:
    r"""The graph of the nearest neighbours, W (E, N, N).

    :math:`w_{pq} = 1` where q is among the ``neighbors`` nearest samples of p, itself not counted. ``convex`` takes
    :math:`(W + W^\top) / 2` and adds the smallest multiple of the identity that leaves no eigenvalue below zero; to the
    objective of hard assignments that adds a constant.

    Args:
        features: (E, N, D).
        neighbors: 0 ≤ neighbours < N.
        convex: whether the result is symmetric and positive semi-definite.
    """
    tasks, count, _ = features.shape
    if not 0 <= neighbors < count:
        raise UserError(f"affinity: neighbors={neighbors} must be at least 0 and below the {count} samples of a task")
    distances = torch.cdist(features, features)
    distances.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    nearest = distances.topk(neighbors, dim=2, largest=False).indices
    graph = features.new_zeros(tasks, count, count).scatter_(2, nearest, 1.0)
    if not convex or neighbors == 0:
        return graph
    graph = (graph + graph.mT) / 2
    lowest = torch.linalg.eigvalsh(graph)[:, 0]
    return graph + torch.diag_embed((-lowest).clamp_min(0.0).unsqueeze(1).expand(-1, count))


def assign(
    distances: Tensor,
    graph: Tensor,
    weight: float,
    start: Tensor,
    temperature: float = 1.0,
    fixed: Tensor | None = None,
    steps: int = 5,
    tolerance: float = 1e-4,
) -> Tensor:
    r"""Assignments (E, N, K) for given distances: the bound's update, repeated until no task's entries move.

    Args:
        distances: d (E, N, K).
        graph: W (E, N, N).
        weight: λ ≥ 0.
        start: assignments to begin with, (E, N, K).
        temperature: t ≥ 0; 0 takes the nearest prototype.
        fixed: (N,) bool, the samples that keep their start.
        steps: most updates; any number leaves the objective no higher than it was.
        tolerance: largest change of an entry at which to stop.
    """
    current = start
    for _ in range(steps):
        scores = -distances + weight * (graph @ current)
        if temperature > 0:
            updated = (scores / temperature).softmax(dim=2)
        else:
            updated = F.one_hot(scores.argmax(dim=2), scores.shape[2]).to(scores.dtype)
        if fixed is not None:
            updated = torch.where(fixed[:, None], start, updated)
        moved = float((updated - current).abs().max())
        current = updated
        if moved <= tolerance:
            break
    return current


def energy(distances: Tensor, assignments: Tensor, graph: Tensor, weight: float, temperature: float = 1.0) -> Tensor:
    """The objective E of every task, (E,)."""
    entropy = torch.special.entr(assignments).sum(dim=(1, 2))  # −z log z
    pairs = ((graph @ assignments) * assignments).sum(dim=(1, 2))
    return (assignments * distances).sum(dim=(1, 2)) - temperature * entropy - weight / 2 * pairs


@dataclass(frozen=True)
class Clusters:
    """What :func:`cluster` found.

    Args:
        assignments: (E, N, K), support samples first.
        prototypes: (E, K, D).
        energies: the objective at the start and after every round, (1 + rounds, E).
    """

    assignments: Tensor
    prototypes: Tensor
    energies: Tensor


def cluster(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    prototype: Prototype = "mean",
    weight: float = 0.0,
    neighbors: int = 3,
    temperature: float = 1.0,
    convex: bool = True,
    clamp: Literal["always", "start"] = "always",
    rounds: int = 100,
    tolerance: float = 1e-4,
) -> Clusters:
    r"""Cluster support and query samples of E tasks into K classes.

    Args:
        support: features (E, S, D).
        labels: of the support samples, (E, S) in 0..K-1, every class at least once in every task.
        query: features (E, Q, D).
        prototype: ``mean`` with squared distances (K-means), ``mode`` or ``medoid`` with
            :math:`d = -\exp(-\lVert x - m \rVert^2 / 2 \sigma^2)` (K-modes), :math:`\sigma^2` the mean squared
            distance between neighbours.
        weight: λ ≥ 0, how much neighbours pull; 0 leaves plain clustering.
        neighbors: of the graph.
        temperature: t ≥ 0; with 0, λ = 0 and ``mean`` this is Lloyd's algorithm with a fixed support.
        convex: see :func:`affinity`.
        clamp: ``always`` keeps the support samples at their labels, ``start`` only until the first update.
        rounds: most alternations of the two blocks.
        tolerance: relative change of every task's objective at which to stop.

    Raises:
        UserError: for shapes that do not fit, a class without support, or a value out of range.
    """
    if support.ndim != 3 or query.ndim != 3 or labels.shape != support.shape[:2] or len(support) != len(query):
        raise UserError(
            f"cluster: support (E, S, D), labels (E, S) and query (E, Q, D) do not fit: {tuple(support.shape)}, "
            f"{tuple(labels.shape)}, {tuple(query.shape)}"
        )
    if weight < 0 or temperature < 0:
        raise UserError(f"cluster: weight={weight} and temperature={temperature} must not be negative")
    classes = int(labels.max()) + 1
    known = F.one_hot(labels, classes).to(support.dtype)
    if not bool((known.sum(dim=1) > 0).all()):
        raise UserError(f"cluster: every task needs a support sample of each of the {classes} classes")
    features = torch.cat([support, query], dim=1)
    number = support.shape[1]
    fixed = torch.arange(features.shape[1], device=features.device) < number
    graph = affinity(features, neighbors, convex) if weight > 0 else features.new_zeros(len(features), 1, 1)
    if weight == 0:
        graph = graph.expand(-1, features.shape[1], features.shape[1])
    spread = _spread(features, max(neighbors, 1)) if prototype != "mean" else features.new_ones(len(features))
    prototypes = (known.mT @ support) / known.sum(dim=1).unsqueeze(2)
    distances = _distances(features, prototypes, prototype, spread)
    assignments = torch.cat([known, (-distances[:, number:] / max(temperature, 1e-12)).softmax(dim=2)], dim=1)
    energies = [energy(distances, assignments, graph, weight, temperature)]
    going = torch.arange(len(features), device=features.device)  # tasks that still move; the others rest
    for _ in range(rounds):
        x, w, s = features[going], graph[going], spread[going]
        z = assign(distances[going], w, weight, assignments[going], temperature, fixed if clamp == "always" else None)
        m = _move(x, z, prototypes[going], prototype, s)
        d = _distances(x, m, prototype, s)
        reached = energies[-1].clone()
        reached[going] = energy(d, z, w, weight, temperature)
        assignments[going], prototypes[going], distances[going] = z, m, d
        energies.append(reached)
        change = (reached - energies[-2])[going].abs()
        going = going[change > tolerance * energies[-2][going].abs()]
        if len(going) == 0:
            break
    return Clusters(assignments, prototypes, torch.stack(energies))


def _spread(features: Tensor, neighbors: int) -> Tensor:
    """Mean squared distance to the nearest neighbours, (E,)."""
    squared = torch.cdist(features, features).square()
    nearest = squared.topk(min(neighbors + 1, features.shape[1]), dim=2, largest=False).values[:, :, 1:]
    return nearest.mean(dim=(1, 2)).clamp_min(torch.finfo(features.dtype).tiny)


def _distances(features: Tensor, prototypes: Tensor, prototype: Prototype, spread: Tensor) -> Tensor:
    squared = torch.cdist(features, prototypes).square()
    return squared if prototype == "mean" else -(-squared / (2 * spread.view(-1, 1, 1))).exp()


def _move(features: Tensor, assignments: Tensor, old: Tensor, prototype: Prototype, spread: Tensor) -> Tensor:
    """Prototypes (E, K, D) that do not raise the objective."""
    if prototype == "medoid":
        candidates = torch.cat([features, old], dim=1)
        costs = assignments.mT @ _distances(features, candidates, prototype, spread)  # (E, K, N + K)
        best = costs.argmin(dim=2, keepdim=True)
        return candidates.gather(1, best.expand(-1, -1, features.shape[2]))
    weights = assignments.mT
    if prototype == "mode":  # one step of mean shift: the weighted mean under the kernel
        weights = weights * -_distances(features, old, prototype, spread).mT
    total = weights.sum(dim=2, keepdim=True)
    return torch.where(total > 0, weights @ features / total.clamp_min(torch.finfo(features.dtype).tiny), old)


def prepare_tasks(
    support: Tensor, query: Tensor, center: Tensor | None = None, shift: bool = True
) -> tuple[Tensor, Tensor]:
    """Features as the paper clusters them: centred, of unit length, the query's mean moved onto the support's.

    Args:
        support: (E, S, D).
        query: (E, Q, D).
        center: mean feature (D,) of the classes that the network was trained on; ``None`` does not centre.
        shift: whether to move the query samples.
    """
    if center is not None:
        support, query = support - center, query - center
    support, query = F.normalize(support, dim=2), F.normalize(query, dim=2)
    if shift:
        query = query + (support.mean(dim=1, keepdim=True) - query.mean(dim=1, keepdim=True))
    return support, query


def draw_tasks(
    labels: Tensor, tasks: int, ways: int, shots: int, queries: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices of support (E, K·S) and query samples (E, K·Q), class by class: task class k is row block k.

    Args:
        labels: (N,) of the samples to draw from; -1 is never drawn.
        tasks: E.
        ways: K classes of a task.
        shots: S support samples a class.
        queries: Q query samples a class.
        generator: decides everything.

    Raises:
        UserError: when there are fewer classes than ``ways``, or a class with fewer samples than a task takes.
    """
    classes, counts = labels[labels >= 0].unique(return_counts=True)
    if len(classes) < ways:
        raise UserError(f"draw_tasks: ways={ways}, but there are only {len(classes)} classes")
    if int(counts.min()) < shots + queries:
        raise UserError(
            f"draw_tasks: shots={shots} and queries={queries}, but a class has only {int(counts.min())} samples"
        )
    known = labels >= 0
    chosen = torch.rand(tasks, len(classes), generator=generator).argsort(dim=1)[:, :ways]  # (E, K)
    order = torch.rand(tasks, len(labels), generator=generator)
    rows = []
    for way in range(ways):  # over the few classes of a task, not over samples
        member = (labels == classes[chosen[:, way]].unsqueeze(1)) & known
        rows.append(order.masked_fill(~member, 2.0).argsort(dim=1)[:, : shots + queries])
    samples = torch.stack(rows, dim=1)
    return samples[:, :, :shots].flatten(1), samples[:, :, shots:].flatten(1)
