"""How alike two gradients are, but for their size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.core.distributed import mean_across_ranks, sum_with_gradient, world_size


def gradient_alignment(moving: Tensor, fixed: Tensor) -> Tensor:
    r"""Mean squared difference of two standardised gradients.

    .. math:: L = \tfrac1P \lVert N(g) - \mathrm{sg}[N(h)] \rVert^2, \qquad
        N(g) = \frac{g - \mathrm{sg}[\mathrm{mean}(g)]}{\mathrm{sg}[\mathrm{std}(g)]}

    0 where h is g times a positive number, at most about 4. No gradient flows through mean, std (unbiased) and h.

    Args:
        moving: g (P,), with a graph.
        fixed: h (P,).

    Source: Chen et al. 2023, arXiv 2304.04494, equation 6, with N as in the authors' code.
    """
    standardised = [(g - g.detach().mean()) / g.detach().std().clamp(min=1e-30) for g in (moving, fixed.detach())]
    return (standardised[0] - standardised[1]).square().mean()


def alignment_of_losses(loss: Tensor, main: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    r""":func:`gradient_alignment` of the gradients of two losses, each the mean over the ranks.

    It has a gradient with respect to whatever else the first loss depends on. Both graphs are kept.

    Args:
        loss: of the gradient g.
        main: of the gradient h.
        parameters: with respect to which; where a loss does not depend on one, its gradient is 0.
    """
    with torch.autocast(main.device.type, enabled=False):
        moving = _flat(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True), parameters)
        fixed = _flat(torch.autograd.grad(main, parameters, retain_graph=True, allow_unused=True), parameters)
        return gradient_alignment(sum_with_gradient(moving) / world_size(), mean_across_ranks(fixed))


def gradient_only(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """0, with the gradient of a loss with respect to these parameters and to nothing else; the graph is kept."""
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    parts = ((p - p.detach()) * g for p, g in zip(parameters, found, strict=True) if g is not None)
    return torch.stack([part.sum() for part in parts]).sum()


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """One vector; zeros where nothing depends on a parameter."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
