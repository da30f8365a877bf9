"""Trusting one's own confident predictions when the labels come from a weak supervisor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy with probabilities as targets.

    .. math:: L = -\tfrac1B \sum_i \sum_c t_{ic} \log \mathrm{softmax}(z_i)_c, \qquad
              \partial L / \partial z = (\mathrm{softmax}(z) - t) / B

    Args:
        logits: z (B, C).
        targets: t (B, C), rows that sum to 1; cast to the logits' type.
    """
    return F.cross_entropy(logits, targets.to(logits.dtype))


def harden(probabilities: Tensor, prior: Tensor, marginal: Tensor | None = None) -> Tensor:
    r"""Hard labels whose shares follow a prior rather than the model's own bias.

    Two classes, as in the paper: the threshold t on :math:`p_1` is the quantile at which the share of positives in
    the batch is the prior's, so :math:`\hat f = 1[p_1 > t]`. By rank, so that ties cannot all fall on one side.

    More classes, where one threshold does not exist: a class that the model predicts more often than the prior says
    has to win by more, :math:`\hat f = \arg\max_c \; p_c \, \pi_c / \bar p_c` with :math:`\bar p` the model's own
    mean prediction. With :math:`\bar p = \pi` this is the plain arg max.

    Args:
        probabilities: p (B, C), the student's.
        prior: π (C,), mean of the weak labels.
        marginal: p̄ (C,), a running mean of the student's predictions; the batch's own mean where None.
            Not used with two classes.

    Returns:
        Labels (B,), int64, without a gradient.

    Source: Burns et al. 2023, arXiv 2312.09390, appendix A.4; the form for many classes is ours.
    """
    p = probabilities.detach()
    if p.shape[1] == 2:
        positives = (prior[1] * len(p)).round()
        rank = p[:, 1].argsort(descending=True, stable=True).argsort()  # 0 = most likely positive
        return (rank < positives).long()
    mean = p.mean(dim=0) if marginal is None else marginal
    return (p * (prior / mean.clamp_min(torch.finfo(p.dtype).tiny))).argmax(dim=1)


def confidence_ramp(progress: float, warmup: float, released: bool = False) -> float:
    r"""The share of the full confidence weight in use after a share of training.

    The paper: linear, :math:`\min(1, p / w)`. The released code: :math:`p` up to :math:`w`, then 1, which jumps by
    :math:`1 - w` at the end of the warm-up.

    Args:
        progress: p in [0, 1].
        warmup: w in [0, 1]; 0 = no warm-up.
        released: follow the released code.
    """
    if released:
        return 1.0 if progress > warmup else progress
    return 1.0 if progress >= warmup else progress / warmup
