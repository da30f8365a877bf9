"""Features of a length: larger ones transfer better."""

from __future__ import annotations

from torch import Tensor


def feature_norms(features: Tensor) -> Tensor:
    r"""Lengths :math:`\lVert f_b \rVert` of features (B, D): (B,), in at least 32 bits."""
    features = features.float() if features.element_size() < 4 else features
    return features.flatten(1).norm(dim=1)


def stepwise_feature_norm(features: Tensor, step: float = 1.0) -> Tensor:
    r"""Every feature is to be longer than it is, by a constant.

    .. math:: L = \tfrac1B \sum_b \big( \lVert f_b \rVert - \mathrm{sg}[\lVert f_b \rVert + \Delta] \big)^2

    sg stops the gradient, so that the value is :math:`\Delta^2` always and only the gradient, :math:`-2 \Delta f_b /
    (B \lVert f_b \rVert)`, says anything.

    Args:
        features: f (B, D).
        step: Δ ≥ 0.

    Returns:
        A scalar.

    Source: Xu et al. 2019, arXiv 1811.07456, equation 7 (SAFN).
    """
    norms = feature_norms(features)
    return (norms - (norms.detach() + step)).square().mean()


def hard_feature_norm(norms: Tensor, radius: float = 25.0) -> Tensor:
    r"""The mean length is to be a radius, :math:`L = \big( \tfrac1B \sum_b \lVert f_b \rVert - R \big)^2`.

    Args:
        norms: lengths (B,), of :func:`feature_norms`.
        radius: R ≥ 0.

    Returns:
        A scalar.

    Source: Xu et al. 2019, arXiv 1811.07456, equation 4 (HAFN).
    """
    return (norms.mean() - radius).square()
