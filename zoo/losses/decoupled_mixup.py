"""Losses of mixed samples, and the decoupled term that lets both classes be confident at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from zoo.core.errors import UserError


def mixed_targets(first: Tensor, second: Tensor, share: Tensor, num_classes: int) -> Tensor:
    r"""Soft labels of mixed samples.

    .. math:: y = \lambda\, e_a + (1 - \lambda)\, e_b

    Args:
        first: classes a (B,).
        second: classes b (B,).
        share: :math:`\lambda` (B,) or a scalar tensor, in [0, 1].
        num_classes: C.

    Returns:
        (B, C), rows summing to 1, in the dtype of ``share``.
    """
    share = share.expand(first.shape).unsqueeze(1)
    return share * one_hot(first, num_classes) + (1 - share) * one_hot(second, num_classes)


def decoupled_terms(logits: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    r"""Each of two mixed classes against all others but its partner.

    .. math:: r_a = -\log \frac{e^{z_a}}{\sum_{c \ne b} e^{z_c}}, \qquad
              r_b = -\log \frac{e^{z_b}}{\sum_{c \ne a} e^{z_c}}

    so that :math:`\partial r_a / \partial z_b = 0`: the two no longer compete. Pairs of one class have no partner to
    be decoupled from; their terms are 0.

    Args:
        logits: z (B, C).
        first: classes a (B,).
        second: classes b (B,).

    Returns:
        :math:`r_a` and :math:`r_b`, (B,) each.

    Source: Liu et al. 2023, arXiv 2203.10761, section 4.
    """
    logits = logits if logits.element_size() >= 4 else logits.float()
    pair = (first != second).unsqueeze(1)

    def against_others(own: Tensor, partner: Tensor) -> Tensor:
        without = logits.masked_fill(one_hot(partner, logits.shape[1]).bool() & pair, -torch.inf)
        own_logit = logits.gather(1, own.unsqueeze(1)).squeeze(1)
        return (without.logsumexp(dim=1) - own_logit) * pair.squeeze(1)

    return against_others(first, second), against_others(second, first)


def term_weight(share: Tensor, power: float) -> Tensor:
    r"""The weight :math:`\lambda^s` of a class's decoupled term; 0 for a class that is not there, also where s = 0.

    Args:
        share: :math:`\lambda` in [0, 1], any shape.
        power: s ≥ 0.
    """
    return share**power * (share > 0)


def decoupled_regularizer(
    logits: Tensor, first: Tensor, second: Tensor, share: Tensor, share_power: float = 0.0
) -> Tensor:
    r"""The decoupled terms of both classes.

    .. math:: R = \lambda^{s}\, r_a + (1 - \lambda)^{s}\, r_b

    The paper has s = 0; the released code weighs the terms by the shares, s = 1 or ½. A class with no share, in a
    sample that is not mixed, has no term for any s.

    Args:
        logits: z (B, C).
        first: classes a (B,).
        second: classes b (B,).
        share: :math:`\lambda` (B,) or a scalar tensor, in [0, 1].
        share_power: s ≥ 0.

    Returns:
        (B,); 0 where both classes are the same.

    Source: Liu et al. 2023, arXiv 2203.10761, section 4; its released head also leaves the term out where the shares
    are exactly equal, for want of a way to tell the classes apart, which is not followed.
    """
    own, partner = decoupled_terms(logits, first, second)
    return term_weight(share, share_power) * own + term_weight(1 - share, share_power) * partner


def decoupled_cross_entropy(
    logits: Tensor, first: Tensor, second: Tensor, share: Tensor, eta: float = 0.1, share_power: float = 0.0
) -> Tensor:
    r"""Mixup's cross-entropy and the decoupled regularizer.

    .. math:: L = -\lambda \log p_a - (1 - \lambda) \log p_b + \eta R

    Args:
        logits: z (B, C); in 32 bits at least from here on.
        first: classes a (B,).
        second: classes b (B,).
        share: :math:`\lambda` (B,) or a scalar tensor, in [0, 1].
        eta: :math:`\eta` ≥ 0; 0 is mixup.
        share_power: s, see :func:`decoupled_regularizer`.

    Returns:
        (B,).

    Source: Liu et al. 2023, arXiv 2203.10761, section 4.
    """
    logits = logits if logits.element_size() >= 4 else logits.float()
    targets = mixed_targets(first, second, share.to(logits.dtype), logits.shape[1])
    loss = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
    return loss + eta * decoupled_regularizer(logits, first, second, share.to(logits.dtype), share_power)


def rescale(share: Tensor, threshold: float = 1.0, power: float = 1.0) -> Tensor:
    r""":math:`h(\lambda) = \min(1, \lambda / t)^\xi`: from the share of a class on it counts as wholly there.

    Args:
        share: :math:`\lambda` in [0, 1], any shape.
        threshold: t in (0, 1].
        power: :math:`\xi` ≥ 0; below 1 raises small shares.

    Raises:
        UserError: if ``threshold`` or ``power`` is out of range.

    Source: Liu et al. 2023, arXiv 2203.10761, section 4; power form of the released ``lambda_adjust``.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"rescale: threshold={threshold} must lie in (0, 1]")
    if power < 0:
        raise UserError(f"rescale: power={power} must not be negative")
    return (share / threshold).clamp(max=1) ** power


def decoupled_binary_cross_entropy(
    logits: Tensor, first: Tensor, second: Tensor, share: Tensor, threshold: float = 1.0, power: float = 1.0
) -> Tensor:
    r"""One yes-or-no question per class, with rescaled shares as the answers.

    .. math:: L = \sum_c \mathrm{BCE}(\sigma(z_c), y_c), \qquad y = \min(1, h(\lambda)\, e_a + h(1 - \lambda)\, e_b)

    Sigmoids do not compete, so decoupling only has to let the answers sum to more than 1.

    Args:
        logits: z (B, C).
        first: classes a (B,).
        second: classes b (B,).
        share: :math:`\lambda` (B,) or a scalar tensor, in [0, 1].
        threshold: t, see :func:`rescale`.
        power: :math:`\xi`, see :func:`rescale`; with t = 1 and ξ = 1 this is mixup with binary cross-entropy.

    Returns:
        (B,), sums over the classes.

    Source: Liu et al. 2023, arXiv 2203.10761, section 4. Answers beyond 1, for two samples of one class, are cut.
    """
    logits = logits if logits.element_size() >= 4 else logits.float()
    share = share.to(logits.dtype).expand(first.shape)
    num_classes = logits.shape[1]
    targets = (
        rescale(share, threshold, power).unsqueeze(1) * one_hot(first, num_classes)
        + rescale(1 - share, threshold, power).unsqueeze(1) * one_hot(second, num_classes)
    ).clamp(max=1)
    return binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
