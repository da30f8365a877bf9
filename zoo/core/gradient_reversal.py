"""A layer that does nothing forward and flips the gradient backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * -ctx.strength, None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    r"""Identity forward, minus λ backward: what follows minimises a loss, what precedes maximises it.

    .. math:: R(x) = x, \qquad \frac{\partial R}{\partial x} = -\lambda I

    One backward pass then takes the descent step of the one and the ascent step of the other, with one optimizer.

    Args:
        x: any tensor.
        strength: λ ≥ 0; 0 cuts the gradient.

    Source: Ganin and Lempitsky 2015, arXiv 1409.7495, eq. 9-10.
    """
    return _Reverse.apply(x, strength)  # type: ignore[no-any-return]
