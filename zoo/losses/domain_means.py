"""Means, distances and pairs of the domains in a batch, without loops over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.core.distributed import gather_across_ranks, gather_with_gradient, sum_across_ranks, sum_with_gradient
from zoo.core.errors import UserError


def domain_indicators(domain: Tensor, num_domains: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Which sample is of which domain: (B,) to 0 and 1 (S, B). A domain outside 0 .. S-1 belongs to none."""
    return (domain == torch.arange(num_domains, device=domain.device).unsqueeze(1)).to(dtype)


def domain_means(values: Tensor, domain: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
    r"""Mean of the values of every domain, over the samples of all ranks.

    .. math:: m_s = \frac1{n_s} \sum_{i: d_i = s} v_i

    Args:
        values: v (B, ...); taken to 32 bits or more.
        domain: d (B,) int64.
        num_domains: S.

    Returns:
        Means (S, ...), 0 for a domain without samples, and their numbers of samples (S,). Gradient flows through the
        means, as in one process on the joint batch.
    """
    values = values.float() if values.element_size() < 4 else values
    members = domain_indicators(domain, num_domains, values.dtype)
    counts = sum_across_ranks(members.sum(dim=1))
    with torch.autocast(values.device.type, enabled=False):
        sums = sum_with_gradient(members @ values.flatten(1) if values.ndim > 1 else members @ values)
    means = sums / counts.clamp(min=1).view(-1, *[1] * (sums.ndim - 1))
    return means.view(num_domains, *values.shape[1:]), counts


def mean_over_domains(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of (S, ...) over the domains that have samples, each counting alike whatever its number."""
    present = (counts > 0).to(values.dtype)
    weights = present / present.sum().clamp(min=1)
    return (weights.view(-1, *[1] * (values.ndim - 1)) * values).sum(dim=0)


def mean_squared_difference(values: Tensor, counts: Tensor) -> Tensor:
    r"""Squared difference of two domains, as a mean over all pairs of them that have samples, and over the entries.

    .. math:: \frac{2}{S (S - 1)} \sum_{i < j} \lVert v_i - v_j \rVert^2 / P
        = \frac{2}{S - 1} \sum_i \lVert v_i - \bar v \rVert^2 / P

    The right side takes no pairs.

    Args:
        values: v (S, ...) of P entries each.
        counts: samples (S,) of each domain.

    Returns:
        A scalar; 0 for a single domain.
    """
    rows = values.flatten(1)
    present = (counts > 0).to(rows.dtype)
    away = (rows - mean_over_domains(rows, counts)).square().mean(dim=1)
    return 2 * (present * away).sum() / (present.sum() - 1).clamp(min=1)


def pairwise_coral(features: Tensor, domain: Tensor, num_domains: int, means: bool = True) -> Tensor:
    r"""Mean over all pairs of domains of how far their first two moments are apart.

    .. math:: \frac{2}{S (S - 1)} \sum_{i < j} \Big( \tfrac1D \lVert \mu_i - \mu_j \rVert^2
        + \tfrac1{D^2} \lVert C_i - C_j \rVert_F^2 \Big)

    The samples of all ranks count. Covariances have n - 1 in the denominator.

    Args:
        features: (B, D); taken to 32 bits or more.
        domain: (B,) int64.
        num_domains: S.
        means: ``False`` leaves the first term out and divides the second by 4, which is Deep CORAL's own loss.

    Returns:
        A scalar ≥ 0; 0 for a single domain.

    Source: Sun and Saenko 2016, arXiv 1607.01719, equations 1-3; pairs and the term of the means as in DomainBed.
    """
    features = features.float() if features.element_size() < 4 else features
    centres, counts = domain_means(features, domain, num_domains)
    members = domain_indicators(domain, num_domains, features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        # the mean is a constant here: its gradient is 0 over all samples, though not over those of one rank
        centred = features - members.T @ centres.detach()
        products = (members.unsqueeze(2) * centred).transpose(1, 2) @ centred  # (S, D, D)
        covariances = sum_with_gradient(products) / (counts - 1).clamp(min=1).view(-1, 1, 1)
        apart = mean_squared_difference(covariances, counts)
        return mean_squared_difference(centres, counts) + apart if means else apart / 4


def pairwise_mmd(
    features: Tensor,
    domain: Tensor,
    num_domains: int,
    gammas: Sequence[float] = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0),
) -> Tensor:
    r"""Mean over all pairs of domains of the squared maximum mean discrepancy, under a sum of Gaussian kernels.

    .. math:: \frac{2}{S (S - 1)} \sum_{i < j} \big( \bar k_{ii} + \bar k_{jj} - 2 \bar k_{ij} \big), \qquad
        k(x, y) = \sum_\gamma e^{-\gamma \lVert x - y \rVert^2}

    :math:`\bar k_{ij}` is the mean over all samples of i and of j, pairs of a sample with itself included (the biased
    estimator). The samples of all ranks count; one kernel matrix of all of them serves all pairs.

    Args:
        features: (B, D); taken to 32 bits or more.
        domain: (B,) int64.
        num_domains: S.
        gammas: :math:`\gamma`; DomainBed's seven unless given.

    Returns:
        A scalar ≥ 0; 0 for a single domain.

    Source: Gretton et al. 2012, JMLR 13, equation 5; kernels and pairs as in DomainBed.
    """
    features = gather_with_gradient(features.float() if features.element_size() < 4 else features)
    members = domain_indicators(gather_across_ranks(domain), num_domains, features.dtype)
    counts = members.sum(dim=1)
    with torch.autocast(features.device.type, enabled=False):
        centred = features - features.detach().mean(dim=0)  # distances stay what they are, but keep their digits
        squares = centred.square().sum(dim=1)
        distances = (squares.unsqueeze(1) + squares - 2 * centred @ centred.T).clamp(min=0)
        kernel = torch.stack([torch.exp(-gamma * distances) for gamma in gammas]).sum(dim=0)
        shares = members / counts.clamp(min=1).unsqueeze(1)
        between = shares @ kernel @ shares.T  # (S, S)
    present = (counts > 0).to(between.dtype)
    number = present.sum()
    # the sum over ordered pairs of k_ii + k_jj - 2 k_ij, the diagonal being 0
    total = 2 * number * (present * between.diagonal()).sum() - 2 * (present @ between @ present)
    return total / (number * (number - 1)).clamp(min=1)


def domain_rows(domain: Tensor, num_domains: int) -> Tensor:
    """Rows of the samples of each domain: (B,) to (S, B / S), for a batch with as many samples of every domain.

    Raises:
        UserError: for a batch that is no multiple of S.
    """
    if len(domain) % num_domains:
        raise UserError(f"a batch of {len(domain)} has not as many samples of each of {num_domains} domains")
    return domain.argsort(stable=True).view(num_domains, -1)


def cross_domain_partners(domain: Tensor, num_domains: int, order: Tensor) -> tuple[Tensor, Tensor]:
    r"""A sample of another domain for every sample, each taken once: the domains in a ring.

    Args:
        domain: (B,) int64, as many samples of every domain.
        num_domains: S.
        order: the ring, a permutation of 0 .. S-1; each domain goes with the next.

    Returns:
        Row of the partner (B,), and the place in the ring (B,) of each sample's own domain.

    Raises:
        UserError: for a batch that is no multiple of S.
    """
    rows = domain_rows(domain, num_domains)
    order = order.to(domain.device)
    partners, places = torch.empty_like(domain), torch.empty_like(domain)
    ring = rows[order]
    partners[ring] = ring.roll(-1, 0)
    places[ring] = torch.arange(num_domains, device=domain.device).unsqueeze(1).expand_as(ring)
    return partners, places
