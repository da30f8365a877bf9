"""How far apart the second moments of two distributions are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoo.core.errors import UserError, suggest

FORMS = ("covariance", "moments")


def coral(x: Tensor, y: Tensor, form: Literal["covariance", "moments"] = "covariance") -> Tensor:
    r"""Distance of the covariances of two sets of features.

    Two losses bear the name. ``"covariance"`` is the paper's and pytorch-adapt's:

    .. math:: L = \frac{1}{4 d^2} \lVert C_x - C_y \rVert_F^2, \qquad
        C_x = \tfrac{1}{n - 1} \sum_i (x_i - \bar x)(x_i - \bar x)^\top

    ``"moments"`` is TLlib's and DomainBed's, in which the means count too and the factor 4 is missing:

    .. math:: L = \tfrac1d \lVert \bar x - \bar y \rVert^2 + \tfrac{1}{d^2} \lVert C_x - C_y \rVert_F^2

    Args:
        x: features (n, d).
        y: features (m, d). The covariance of a single sample counts as 0.
        form: which of the two.

    Returns:
        A scalar ≥ 0 in at least 32 bits.

    Raises:
        UserError: for another form.

    Source: Sun and Saenko 2016, arXiv 1607.01719, equations 1-3.
    """
    if form not in FORMS:
        raise UserError(f"coral: form={form!r} must be one of {', '.join(FORMS)}.{suggest(str(form), FORMS)}")
    with torch.autocast(x.device.type, enabled=False):
        x, y = (z.flatten(1).float() if z.element_size() < 4 else z.flatten(1) for z in (x, y))
        difference = (covariance(x) - covariance(y)).square().mean()
        if form == "covariance":
            return difference / 4
        return (x.mean(dim=0) - y.mean(dim=0)).square().mean() + difference


def covariance(x: Tensor) -> Tensor:
    """Covariance (d, d) of the rows of (n, d), with n - 1 in the denominator."""
    centred = x - x.mean(dim=0)
    return centred.T @ centred / max(len(x) - 1, 1)
