"""Losses in which a discriminator tells domains apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.distributed import mean_across_ranks
from zoo.losses.entropy import entropy


def domain_loss(
    source: Tensor, target: Tensor, source_weights: Tensor | None = None, target_weights: Tensor | None = None
) -> Tensor:
    r"""Binary cross-entropy of a domain discriminator: source is 1, target is 0, each domain counts half.

    .. math:: L_d = -\tfrac1{2 B_s} \sum_i w_i \log \sigma(d_i^s) - \tfrac1{2 B_t} \sum_j w_j \log (1 - \sigma(d_j^t))

    It works on logits, so it is safe under autocast, and is log 2 for a discriminator that cannot tell them apart.

    Args:
        source: domain logits of source samples (B_s,) or (B_s, 1).
        target: domain logits of target samples (B_t,) or (B_t, 1); the two sizes may differ.
        source_weights: w (B_s,); 1 unless given.
        target_weights: w (B_t,).

    Returns:
        A scalar. An empty side counts 0.

    Source: Ganin et al. 2016, arXiv 1505.07818, eq. 8; the half as in TLlib.
    """
    return 0.5 * (_mean_softplus(-source, source_weights) + _mean_softplus(target, target_weights))


def domain_accuracy(source: Tensor, target: Tensor) -> Tensor:
    """Share of samples whose domain is recognised, each domain counting half; 0.5 means that domains look alike."""
    return 0.5 * ((source > 0).float().mean() + (target <= 0).float().mean())


def inverted_domain_loss(target: Tensor) -> Tensor:
    r"""What target features minimise to pass for source ones: :math:`-\tfrac1{B_t} \sum_j \log \sigma(d_j^t)`.

    Unlike the reversed loss, :math:`\log(1 - \sigma)`, its gradient does not vanish where the discriminator is sure.

    Args:
        target: domain logits of target samples (B_t,).

    Source: Tzeng et al. 2017, arXiv 1702.05464, inverted labels in section 3.
    """
    return _mean_softplus(-target)


@torch.no_grad()
def entropy_weights(source_logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weights by how sure a prediction is, with mean 1 over both domains, each counting half, and all ranks.

    .. math:: w_i \propto 1 + e^{-H(g_i)}

    Args:
        source_logits: (B_s, C).
        target_logits: (B_t, C).

    Returns:
        Weights (B_s,) and (B_t,), without a gradient.

    Source: Long et al. 2018, arXiv 1705.10667, entropy conditioning; normalised as in TLlib, where both
    batches have one size.
    """
    source, target = (1 + (-entropy(logits)).exp() for logits in (source_logits, target_logits))
    mean = mean_across_ranks(0.5 * (source.mean() + target.mean()))
    return source / mean, target / mean


def _mean_softplus(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """-log σ(-x) = softplus(x), in at least 32 bits."""
    losses = F.softplus(logits.float() if logits.element_size() < 4 else logits)
    if weights is not None:
        losses = losses * weights.view_as(losses)
    return losses.sum() / max(logits.numel(), 1)
