"""How far apart two distributions are, by the means of their samples in a kernel's feature space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zoo.core.errors import UserError, suggest

Estimator = Literal["unbiased", "biased", "linear", "pairs"]
ESTIMATORS = ("unbiased", "biased", "linear", "pairs")
MULTIPLIERS = (0.125, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Gaussian:
    r"""A sum of Gaussian kernels, :math:`k(x, y) = \sum_u \exp\big( -\lVert x - y \rVert^2 / (2 a_u \sigma^2) \big)`.

    Args:
        multipliers: :math:`a_u`; TLlib's five unless given.
        variance: :math:`\sigma^2`; ``None`` is the mean of the squared distances between all samples of both sides,
            each with itself too, as in TLlib. No gradient flows through it.
    """

    multipliers: tuple[float, ...] = MULTIPLIERS
    variance: float | None = None


def mmd(
    x: Tensor,
    y: Tensor,
    multipliers: Sequence[float] = MULTIPLIERS,
    variance: float | None = None,
    estimator: Estimator = "unbiased",
) -> Tensor:
    r"""Squared maximum mean discrepancy under a sum of Gaussian kernels.

    .. math:: d^2 = \mathbb E\, k(x, x') + \mathbb E\, k(y, y') - 2\, \mathbb E\, k(x, y)

    Estimators, for n samples of x and m of y:

    - ``"unbiased"``: means over all pairs of different samples; may be negative. TLlib's quadratic estimator is this
      plus the constant 2 / (n - 1), which changes no gradient and is left out here.
    - ``"biased"``: pairs of a sample with itself count as well; never negative, and 0 for equal sets. DomainBed's.
    - ``"linear"``: each sample with the next one, in a ring; unbiased, and memory grows with n rather than n². TLlib's
      (without the same constant).
    - ``"pairs"``: samples 2i - 1 and 2i, each used once; the paper's linear estimator, and pytorch-adapt's.

    Both linear ones depend on the order of the samples. Where n and m differ, the shorter side is gone through again.

    Args:
        x: features (n, D).
        y: features (m, D).
        multipliers: see :class:`Gaussian`.
        variance: see :class:`Gaussian`. DomainBed's :math:`\exp(-\gamma d^2)` is variance 1 and
            :math:`a = 1 / (2 \gamma)`.
        estimator: all but ``"biased"`` need at least two samples of each.

    Returns:
        A scalar in at least 32 bits.

    Raises:
        UserError: for another estimator, or a single sample.

    Source: Long et al. 2015, arXiv 1502.02791, equations 1-4; Gretton et al. 2012, JMLR 13, lemmas 6 and 14.
    """
    return joint_mmd([x], [y], [Gaussian(tuple(multipliers), variance)], estimator)


def joint_mmd(
    x: Sequence[Tensor], y: Sequence[Tensor], kernels: Sequence[Gaussian], estimator: Estimator = "unbiased"
) -> Tensor:
    r"""Squared discrepancy of the joint distribution of several layers: the kernel is the product of theirs.

    .. math:: k\big((x^1, \ldots, x^L), (y^1, \ldots, y^L)\big) = \prod_l k_l(x^l, y^l)

    Args:
        x: of each layer (n, D_l).
        y: of each layer (m, D_l).
        kernels: of each layer.
        estimator: see :func:`mmd`.

    Returns:
        A scalar in at least 32 bits; for one layer that of :func:`mmd`.

    Raises:
        UserError: see :func:`mmd`.

    Source: Long et al. 2017, arXiv 1605.06636, equations 6-9.
    """
    if estimator not in ESTIMATORS:
        near = suggest(str(estimator), ESTIMATORS)
        raise UserError(f"mmd: estimator={estimator!r} must be one of {', '.join(ESTIMATORS)}.{near}")
    n, m = len(x[0]), len(y[0])
    if min(n, m) < (1 if estimator == "biased" else 2):
        raise UserError(f"mmd: {n} and {m} samples are too few for estimator={estimator!r}")
    with torch.autocast(x[0].device.type, enabled=False):
        layers = [(*_centred(a, b), kernel) for a, b, kernel in zip(x, y, kernels, strict=True)]
        if estimator in ("linear", "pairs"):
            return _along_pairs(layers, n, m, estimator)
        within_x = _product([_values(_distances(a, a), v, kernel) for a, _, v, kernel in layers])
        within_y = _product([_values(_distances(b, b), v, kernel) for _, b, v, kernel in layers])
        between = _product([_values(_distances(a, b), v, kernel) for a, b, v, kernel in layers])
        if estimator == "biased":
            return within_x.mean() + within_y.mean() - 2 * between.mean()
        return _mean_off_diagonal(within_x) + _mean_off_diagonal(within_y) - 2 * between.mean()


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both without their common mean, in 32 bits or more, and the mean squared distance between all of their samples.

    Distances stay what they are, but keep their digits; and the mean of all takes no matrix of them: it is twice the
    mean squared distance from the common mean.
    """
    x, y = (z.flatten(1).float() if z.element_size() < 4 else z.flatten(1) for z in (x, y))
    mean = torch.cat([x, y]).detach().mean(dim=0)
    x, y = x - mean, y - mean
    variance = 2 * torch.cat([x, y]).detach().square().sum(dim=1).mean()
    return x, y, variance


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (n, m)."""
    squares = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_min(0)


def _values(distances: Tensor, variance: Tensor, kernel: Gaussian) -> Tensor:
    """The kernel at squared distances."""
    if kernel.variance is not None:
        variance = distances.new_full((), kernel.variance)
    # Where all samples are equal, the gradient is 0 times 1 / floor, however often it is multiplied on its way back.
    scaled = distances / (2 * variance).clamp_min(torch.finfo(distances.dtype).tiny ** 0.5)
    return torch.stack([(-scaled / a).exp() for a in kernel.multipliers]).sum(dim=0)


def _product(values: list[Tensor]) -> Tensor:
    product = values[0]
    for other in values[1:]:
        product = product * other
    return product


def _mean_off_diagonal(values: Tensor) -> Tensor:
    n = len(values)
    return (values.sum() - values.diagonal().sum()) / (n * (n - 1))


def _along_pairs(layers: list[tuple[Tensor, Tensor, Tensor, Gaussian]], n: int, m: int, estimator: str) -> Tensor:
    """Means of the kernel over pairs, without a matrix."""
    device = layers[0][0].device
    if estimator == "pairs":
        first = 2 * torch.arange(max(n // 2, m // 2), device=device)
        x1, y1 = first % (n - n % 2), first % (m - m % 2)
        x2, y2 = x1 + 1, y1 + 1
    else:
        first = torch.arange(max(n, m), device=device)
        x1, y1, x2, y2 = first % n, first % m, (first + 1) % n, (first + 1) % m

    def mean(left: int, rows: Tensor, right: int, columns: Tensor) -> Tensor:
        values = [
            _values(((x, y)[left][rows] - (x, y)[right][columns]).square().sum(dim=1), variance, kernel)
            for x, y, variance, kernel in layers
        ]
        return _product(values).mean()

    return mean(0, x1, 0, x2) + mean(1, y1, 1, y2) - mean(0, x1, 1, y2) - mean(0, x2, 1, y1)
