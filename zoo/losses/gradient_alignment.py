"""How alike two gradients are, but for their size."""

from torch import Tensor


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
