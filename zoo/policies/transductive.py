r"""Thresholds that minimise a transductive bound on the error among the selected.

Feofanov, Devijver and Amini, AAAI 2019, "Transductive Bounds for the Multi-class Majority Vote Classifier"; with
Amini et al. 2022, arXiv 2202.12040.
"""

import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.policies.selection import ClassThresholds

_TOLERANCE = 1e-12  # between grid points without a sample the bound is constant but for rounding


class TransductiveBound(ClassThresholds):
    r"""One threshold per class, where the bound on the conditional Bayes error is smallest (MSLA).

    .. math:: \theta_k = \arg\min_\theta \frac{\tfrac1N \sum_{i \ne k} u_i\, R_{ik}(\theta)}
        {\tfrac1N |\{n : p_{nk} \ge \theta, \hat y_n = k\}|}, \quad u_i = \sum_n p_{ni}

    .. math:: R_{ik}(\theta) = \inf_{\gamma \in (\theta, 1]} \Big\{ I_{ik}(\theta, \gamma) + \tfrac1\gamma
        \big[ K_{ik} + M_{ik}(\theta) - M_{ik}(\gamma) \big]_+ \Big\}

    with the averages over samples weighted by their probability of class :math:`i`,
    :math:`I_{ik}(\theta, \gamma) = \mathbb E_i \mathbb 1[\theta \le p_k < \gamma]`,
    :math:`M_{ik}(\theta) = \mathbb E_i\, p_k \mathbb 1[p_k < \theta]` and
    :math:`K_{ik} = \mathbb E_i\, p_k \mathbb 1[\hat y = k]`. Both :math:`\theta` and :math:`\gamma` run over a grid.

    The paper then gives labeled and pseudo-labeled samples the same total weight, 1/l and 1/s each: that is
    ``unlabeled_weight=1`` of :class:`~zoo.semi_supervised.self_training.SelfTraining`.

    Args:
        num_classes: number of classes C.
        grid: values of each of the two.
        early_stop: stop the search along each grid where the released code does, at the second rise in a row, instead
            of going through all of it.

    Raises:
        UserError: for a grid of fewer than 1.

    Source: Feofanov et al. 2019, and their code, of which ``early_stop`` gives the same figures.
    """

    def __init__(self, num_classes: int, grid: int = 50, early_stop: bool = False) -> None:
        super().__init__(num_classes)
        if grid < 1:
            raise UserError(f"TransductiveBound: grid={grid} must be at least 1")
        self.grid, self.early_stop = grid, early_stop

    def thresholds(self, probabilities: Tensor, prior: Tensor | None = None) -> Tensor:
        """The minimisers, (C,)."""
        return bound_thresholds(probabilities, self.grid, self.early_stop)


def bound_thresholds(probabilities: Tensor, grid: int = 50, early_stop: bool = False) -> Tensor:
    r"""The minimisers :math:`\theta_k` of the bound, see :class:`TransductiveBound`.

    Sums over :math:`p_k < \gamma` are differences of cumulative sums over the sorted :math:`p_k`: N log N for each
    class, however fine the grid.

    Args:
        probabilities: (N, C), computed with in float64.
        grid: values of each of :math:`\theta` and :math:`\gamma`.
        early_stop: see :class:`TransductiveBound`.

    Returns:
        (C,) float64; 1 for a class of no probability at all, which nobody is of.
    """
    p = probabilities.double()
    label, mass = p.argmax(dim=1), p.sum(dim=0)
    steps = torch.arange(grid, dtype=p.dtype, device=p.device)
    found = p.new_ones(p.shape[1])
    for k in range(p.shape[1]):
        values, order = p[:, k].sort()
        weights = p[order] / mass.clamp_min(torch.finfo(p.dtype).tiny)  # each column sums to 1
        chosen = (label[order] == k).to(p.dtype)
        below = _cumulative(weights)
        value_below = _cumulative(weights * values[:, None])
        theta = values[0] + steps * (values[-1] - values[0]) / grid  # (G,)
        gamma = theta[:, None] + (1.0 - theta[:, None]) * (steps + 1.0) / grid  # (G, G)
        low, high = torch.searchsorted(values, theta), torch.searchsorted(values, gamma)
        kept = ((chosen * values)[:, None] * weights).sum(dim=0)  # K
        between = below[high] - below[low][:, None]  # I, (G, G, C)
        rest = kept + value_below[low][:, None] - value_below[high]
        bound = between + rest.clamp_min(0.0) / gamma[:, :, None]
        if early_stop:
            bound = bound.masked_fill(_after_rises(bound, dim=1), torch.inf)
        risk = bound.amin(dim=1)  # (G, C)
        risk[:, k] = 0.0
        selected = (chosen.sum() - _cumulative(chosen[:, None])[low, 0]) / len(p)
        error = (risk * mass / len(p)).sum(dim=1) / torch.where(selected > 0, selected, 1e-15)
        if early_stop:
            error = error.masked_fill(_after_rises(error, dim=0), torch.inf)
        first = (error <= error.min() * (1.0 + _TOLERANCE)).to(torch.uint8).argmax()
        found[k] = torch.where(mass[k] > 0, theta[first], found[k])
    return found


def _cumulative(x: Tensor) -> Tensor:
    """Sums of the first 0, 1, …, N rows, (N, C) → (N + 1, C)."""
    return torch.cat([x.new_zeros(1, x.shape[1]), x.cumsum(dim=0)])


def _after_rises(x: Tensor, dim: int) -> Tensor:
    """Whether an entry lies behind the first, from the fifth on, that is above one that is not below its own."""
    x = x.movedim(dim, 0)
    rises = torch.zeros_like(x, dtype=torch.long)
    low, high = 1.0 - _TOLERANCE, 1.0 + _TOLERANCE
    rises[4:] = ((x[4:] > x[3:-1] * high) & (x[3:-1] >= x[2:-2] * low)).long()
    return (rises.cumsum(dim=0) - rises > 0).movedim(0, dim)
