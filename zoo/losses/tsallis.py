"""Entropies of another shape than Shannon's."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.losses.class_confusion import certainty_weights
from zoo.losses.entropy import entropy


def tsallis_entropy(logits: Tensor, alpha: float = 2.0) -> Tensor:
    r"""Tsallis entropy of every prediction.

    .. math:: S_\alpha(p) = \frac{1}{\alpha - 1} \Big( 1 - \sum_c p_c^\alpha \Big), \qquad
        S_1(p) = -\sum_c p_c \log p_c

    α = 1 is Shannon's, α = 2 is Gini's: the larger, the less it insists that predictions become certain.

    Args:
        logits: (B, C).
        alpha: α > 0, the entropic index.

    Returns:
        S (B,), in at least 32 bits.

    Source: Liu et al. 2021, arXiv 2103.03571, equation 6.
    """
    if alpha == 1.0:
        return entropy(logits)
    log_p = (logits.float() if logits.element_size() < 4 else logits).log_softmax(dim=1)
    return (1 - (alpha * log_p).exp().sum(dim=1)) / (alpha - 1)


def tsallis_confusion(logits: Tensor, alpha: float = 1.9, temperature: float = 2.0) -> Tensor:
    r"""Tsallis entropy in which every class counts alike and certain samples count more: that of CST's code.

    .. math:: L = \frac{1}{\alpha - 1} \sum_c \Big( 1 - \frac{\sum_b w_b p_{bc}^\alpha}{\sum_b w_b p_{bc}} \Big),
        \qquad p = \mathrm{softmax}(z / T)

    with the weights of :func:`~zoo.losses.class_confusion.certainty_weights`. α = 2 is C times
    :func:`~zoo.losses.class_confusion.class_confusion`, and α → 1 its Shannon form.

    Args:
        logits: z (B, C).
        alpha: α > 0.
        temperature: T > 0.

    Returns:
        A scalar ≥ 0 in at least 32 bits.

    Source: the authors' code of Liu et al. 2021, arXiv 2103.03571 (``TsallisEntropy`` in run_cst.py).
    """
    logits = (logits.float() if logits.element_size() < 4 else logits) / temperature
    log_p, weights = logits.log_softmax(dim=1), certainty_weights(logits)[:, None]
    p = log_p.exp()
    # p (1 - p^(α-1)) / (α - 1), and its limit -p log p
    terms = -p * log_p if alpha == 1.0 else -p * torch.expm1((alpha - 1) * log_p) / (alpha - 1)
    mass = (weights * p).sum(dim=0).clamp_min(torch.finfo(p.dtype).tiny)
    return ((weights * terms).sum(dim=0) / mass).sum()
