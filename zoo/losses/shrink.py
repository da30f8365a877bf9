"""Learning from uncertain samples in a class space without the classes that they are confused with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def shrunk_space(probabilities: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    r"""The classes that stay when the closest rivals of the first are removed until it is sure.

    With :math:`p_{(0)} \ge \dots \ge p_{(C-1)}`, the classes of rank 0 and :math:`c^*, \dots, C-1` stay, where

    .. math:: c^* = \min \{ c \ge 2 : \mathrm{conf}(c) \ge \tau \}, \qquad
              \mathrm{conf}(c) = \frac{p_{(0)}}{p_{(0)} + \sum_{r \ge c} p_{(r)}}

    The confidence does not decrease in :math:`c`: the ranks that stay are those where it reaches :math:`\tau`, so that
    a sort and one cumulative sum answer for all samples at once. Rank 1 is always removed. Where no cut reaches
    :math:`\tau`, rank 0 stays alone.

    Args:
        probabilities: p (B, C), not negative; rows need not sum to 1. Half precision is widened.
        threshold: τ in [0, 1].

    Returns:
        The class of rank 0 (B,), and which classes stay, boolean (B, C); without a gradient.

    Source: Yang et al. 2023, arXiv 2308.06777, section 3; the paper's code removes classes one by one in a loop.
    """
    ordered, order = _at_least_32_bits(probabilities.detach()).sort(dim=1, descending=True)
    rest = ordered.flip(1).cumsum(dim=1).flip(1)  # Σ_{r ≥ c} p_(r), small terms first
    reached = ordered[:, :1] / (ordered[:, :1] + rest) >= threshold
    first, second = torch.ones_like(reached[:, :1]), torch.zeros_like(reached[:, 1:2])
    stays = torch.cat([first, second, reached[:, 2:]], dim=1)
    return order[:, 0], torch.empty_like(stays).scatter_(1, order, stays)


def shrink_loss(logits: Tensor, labels: Tensor, stays: Tensor) -> Tensor:
    r"""Cross-entropy among the classes that stay.

    .. math:: \ell_b = -\log \frac{e^{z_{b, y_b}}}{\sum_{c \in S_b} e^{z_{bc}}}

    Removed classes get no gradient at all. A sample of whose classes only the label stays costs 0, with gradient 0.

    Args:
        logits: z (B, C). Half precision is widened.
        labels: y (B,).
        stays: S (B, C), boolean, true at the label.

    Returns:
        The loss of each sample (B,).

    Source: Yang et al. 2023, arXiv 2308.06777, section 3.
    """
    among = _at_least_32_bits(logits).masked_fill(~stays, -torch.inf)
    return cross_entropy(among, labels, reduction="none")


def _at_least_32_bits(x: Tensor) -> Tensor:
    """Half precision cannot tell 0.95 from 0.9492."""
    return x.float() if x.element_size() < 4 else x
