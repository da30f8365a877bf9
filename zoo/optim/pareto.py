"""Directions in which several losses fall together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

_SLACK = 1e-9  # of constraints, relative to the gradients' squared lengths


@torch.no_grad()
def pareto_weights(products: Tensor, guide: Tensor | None = None, guided: Tensor | bool = True) -> Tensor:
    r"""How much each of m gradients counts in a common direction :math:`d = G w`, w on the simplex.

    Without a guide, or where ``guided`` is false, d falls as steeply as can be without raising any loss:

    .. math:: \max_w (Gw)^\top G \tfrac1m \mathbf 1 \quad \text{s.t. } (Gw)^\top g_j \ge 0 \ \forall j

    With the gradient :math:`g_v` of a guide, :math:`J = \{j : g_v^\top g_j > 0\}` and :math:`j^* = \arg\max_J g_v^\top
    g_j`, d goes where the guide falls, and may raise the losses that oppose it, but not more than the guide's own
    direction would:

    .. math:: \max_w (Gw)^\top g_v \quad \text{s.t. } (Gw)^\top g_j \ge [J \ne \emptyset]\, g_v^\top g_j \ \forall j
        \notin J, \quad (Gw)^\top g_{j^*} \ge 0

    This linear program has its solution at a corner of a polytope of m variables: all corners are computed at once,
    on the device and without a synchronisation. Where several are best, the answer is their mean, so that it does not
    depend on the order of the gradients.

    Args:
        products: :math:`G^\top G` (m, m), of few gradients: the corners grow with m.
        guide: :math:`G^\top g_v` (m,).
        guided: whether the guide counts; a tensor costs no synchronisation.

    Returns:
        w (m,), float64, not negative, with sum 1.

    Source: Lv et al. 2021, arXiv 2112.04137, dynamic preference; after Mahapatra and Rajan 2020 (EPO search).
    """
    products = products.double()
    m = len(products)
    scale = products.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)
    products = products / scale
    zero = products.new_zeros(m)
    value, least = products.mean(dim=1), zero
    if guide is not None:
        guide = guide.double() / scale
        agree = guide > 0
        best = agree & (guide == guide.max())
        bound = torch.where(agree, -torch.inf, torch.where(agree.any(), guide, zero)).masked_fill(best, 0.0)
        use = torch.as_tensor(guided, device=guide.device)
        value, least = torch.where(use, guide, value), torch.where(use, bound, least)
    rows = torch.cat([torch.eye(m, dtype=products.dtype, device=products.device), products])
    bounds = torch.cat([zero, least])

    chosen = torch.tensor([*combinations(range(2 * m), m - 1)], device=products.device, dtype=torch.long)
    ones = rows.new_ones(len(chosen), 1, m)
    system, right = torch.cat([rows[chosen], ones], dim=1), torch.cat([bounds[chosen], ones[:, :, 0]], dim=1)
    corners = torch.linalg.solve_ex(system, right.unsqueeze(2)).result.squeeze(2)
    real = corners.isfinite().all(dim=1, keepdim=True)
    corners = torch.where(real, corners, 0.0)
    violation = (bounds - corners @ rows.T).amax(dim=1).masked_fill(~real.squeeze(1), torch.inf)
    feasible = violation <= torch.maximum(violation.min(), violation.new_tensor(_SLACK))  # rounding: the least wrong
    values = (corners @ value).masked_fill(~feasible, -torch.inf)
    top = values.max()
    optimal = (values >= top - _SLACK * value.abs().max()).double()
    weights = (optimal @ corners / optimal.sum()).clamp_min(0.0)
    return weights / weights.sum()


class _Hand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = list(gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # held by nobody else, a gradient is kept instead of copied
        torch._foreach_mul_(gradients, outer[0])  # fresh memory would cost several times the product
        return None, None, *gradients


def with_gradients(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar whose backward pass hands every parameter the gradient that was found for it.

    So the Trainer's own step, with all that belongs to it, can take a direction that is no loss's gradient.

    Args:
        value: what the scalar is.
        parameters: leaves that require a gradient.
        gradients: one for each, of its shape, in memory of its own: the backward pass multiplies them in place.
    """
    # Detached: backward would go through what the value came from as well, with gradients of 0, which costs as much.
    return _Hand.apply(value.detach(), gradients, *parameters)  # type: ignore[no-any-return]
