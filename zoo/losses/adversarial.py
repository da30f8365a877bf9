"""Losses in which a discriminator tells domains apart."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def domain_loss(source: Tensor, target: Tensor) -> Tensor:
    r"""Binary cross-entropy of a domain discriminator: source is 1, target is 0, each domain counts half.

    .. math:: L_d = -\tfrac1{2 B_s} \sum_i \log \sigma(d_i^s) - \tfrac1{2 B_t} \sum_j \log (1 - \sigma(d_j^t))

    It works on logits, so it is safe under autocast, and is log 2 for a discriminator that cannot tell them apart.

    Args:
        source: domain logits of source samples (B_s,) or (B_s, 1).
        target: domain logits of target samples (B_t,) or (B_t, 1); the two sizes may differ.

    Returns:
        A scalar. An empty side counts 0.

    Source: Ganin et al. 2016, arXiv 1505.07818, eq. 8; the half as in TLlib.
    """
    return 0.5 * (_mean_softplus(-source) + _mean_softplus(target))


def domain_accuracy(source: Tensor, target: Tensor) -> Tensor:
    """Share of samples whose domain is recognised, each domain counting half; 0.5 means that domains look alike."""
    return 0.5 * ((source > 0).float().mean() + (target <= 0).float().mean())


def _mean_softplus(logits: Tensor) -> Tensor:
    """-log σ(-x) = softplus(x), in at least 32 bits."""
    logits = logits.float() if logits.element_size() < 4 else logits
    return F.softplus(logits).sum() / max(logits.numel(), 1)
