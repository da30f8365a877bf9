"""What is the same in every domain: risks, their gradients, and the spread of the gradients."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoo.core.distributed import sum_with_gradient
from zoo.losses.domain_means import domain_indicators, domain_means, mean_over_domains
from zoo.losses.head_gradients import logit_gradients


def scale_gradients(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Gradient of every sample's cross-entropy with respect to a factor of its logits, at 1.

    .. math:: \frac{\partial}{\partial w} H(y_i, \mathrm{softmax}(w z_i)) \Big|_{w = 1}
        = \langle p_i - e_{y_i}, z_i \rangle

    Args:
        logits: z (B, C).
        labels: y (B,) int64.

    Returns:
        (B,) in 32 bits or more; gradient flows through z.
    """
    z = logits.float() if logits.element_size() < 4 else logits
    return (logit_gradients(z, labels) * z).sum(dim=1)


def irm_penalty(
    logits: Tensor,
    labels: Tensor,
    domain: Tensor,
    num_domains: int,
    estimator: Literal["unbiased", "squared"] = "unbiased",
) -> tuple[Tensor, Tensor]:
    r"""Squared gradient of each domain's risk with respect to a factor of the logits: how far 1 is from the best.

    .. math:: \Big\lVert \nabla_w R_s(w \cdot z) |_{w = 1} \Big\rVert^2

    ``"squared"`` is that of the batch's risk, and on average too large by the variance of its gradient. ``"unbiased"``
    is the product of the gradients on the even and the odd samples of the domain: right on average, and negative at
    times. Even and odd are counted on each rank; the samples of all ranks count.

    Args:
        logits: z (B, C).
        labels: y (B,) int64.
        domain: s (B,) int64.
        num_domains: S.
        estimator: ``"unbiased"`` or ``"squared"``.

    Returns:
        Of each domain (S,), 0 for one without samples (unbiased: with fewer than two), and their numbers of samples.

    Source: Arjovsky et al. 2019, arXiv 1907.02893, section 3.1 and appendix D (the product).
    """
    gradients = scale_gradients(logits, labels)
    if estimator == "squared":
        means, counts = domain_means(gradients, domain, num_domains)
        return means.square(), counts
    members = domain_indicators(domain, num_domains)
    place = ((members.cumsum(dim=1) - 1) * members).sum(dim=0).long()  # of the sample within its domain
    halves, counts = domain_means(gradients, 2 * domain + place % 2, 2 * num_domains)
    even, odd = halves.view(num_domains, 2).unbind(1)
    return even * odd, counts.view(num_domains, 2).sum(dim=1)


def risk_variance(risks: Tensor, counts: Tensor) -> Tensor:
    r"""Variance of the risks over the domains, with S in the denominator.

    .. math:: \tfrac1S \sum_s (R_s - \bar R)^2

    Args:
        risks: R (S,).
        counts: samples (S,); domains without any are left out.

    Returns:
        A scalar ≥ 0.

    Source: Krueger et al. 2021, arXiv 2003.00688, equation 8.
    """
    return mean_over_domains((risks - mean_over_domains(risks, counts)).square(), counts)


def robust_weights(weights: Tensor, risks: Tensor, rate: float) -> Tensor:
    r"""Exponentiated gradient ascent on the weights of the domains.

    .. math:: q_s \leftarrow q_s e^{\eta R_s} \Big/ \sum_t q_t e^{\eta R_t}

    Args:
        weights: q (S,) > 0.
        risks: R (S,); no gradient flows through them.
        rate: η ≥ 0.

    Returns:
        New weights (S,), which sum to 1.

    Source: Sagawa et al. 2020, arXiv 1911.08731, algorithm 1.
    """
    return (weights.log() + rate * risks.detach().to(weights.dtype)).softmax(dim=0)


def gradient_variances(
    features: Tensor, logits: Tensor, labels: Tensor, domain: Tensor, num_domains: int
) -> tuple[Tensor, Tensor]:
    r"""Variance over each domain's samples of the gradients of a linear head, entry by entry.

    .. math:: v_s = \frac1{n_s} \sum_{i: d_i = s} (g_i - \bar g_s)^2, \qquad
        g_i = (p_i - e_{y_i}) \tilde h_i^\top, \quad \tilde h = (h, 1)

    Two matrix products: the gradients (B, C, D + 1) themselves are never made. The bias is the last column. The samples
    of all ranks count.

    Args:
        features: h (B, D).
        logits: z (B, C).
        labels: y (B,) int64.
        domain: d (B,) int64.
        num_domains: S.

    Returns:
        v (S, C, D + 1), 0 for a domain without samples, and the numbers of samples (S,).

    Source: Rame et al. 2022, arXiv 2109.02934, equation 3.
    """
    delta = logit_gradients(logits, labels)
    h = features.to(delta.dtype)
    h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
    members = domain_indicators(domain, num_domains, delta.dtype)
    _, counts = domain_means(delta[:, 0], domain, num_domains)
    shares = members / counts.clamp(min=1).unsqueeze(1)
    with torch.autocast(h.device.type, enabled=False):

        def moment(left: Tensor, right: Tensor) -> Tensor:
            return (shares.unsqueeze(1) * left.T).flatten(0, 1) @ right  # (S C, D + 1)

        mean, square = sum_with_gradient(torch.stack([moment(delta, h), moment(delta.square(), h.square())]))
    return (square - mean.square()).view(num_domains, delta.shape[1], -1), counts


def variance_distance(variances: Tensor, counts: Tensor) -> Tensor:
    r"""How far the domains' variances are from their average, as a mean over domains and entries.

    .. math:: \tfrac1S \sum_s \tfrac1P \lVert v_s - \bar v \rVert^2

    Args:
        variances: v (S, ...) of P entries each.
        counts: samples (S,); domains without any are left out.

    Returns:
        A scalar ≥ 0.

    Source: Rame et al. 2022, arXiv 2109.02934, equation 4; the mean over the entries, rather than their sum, as in the
    authors' code.
    """
    rows = variances.flatten(1)
    return mean_over_domains((rows - mean_over_domains(rows, counts)).square().mean(dim=1), counts)
