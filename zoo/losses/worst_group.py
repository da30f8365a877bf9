"""The loss of the group that fares worst, and the groups that earlier rounds of training leave behind."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.core.distributed import sum_with_gradient


def worst_group_loss(losses: Tensor, groups: Tensor) -> Tensor:
    r"""The largest of the groups' mean losses.

    .. math:: L = \max_g \frac{\sum_i m_{ig} \ell_i}{\sum_i m_{ig}}

    A sample may be in several groups. Only the worst one has a gradient; a group without samples in the batch is left
    out. The samples of all ranks count.

    Args:
        losses: ℓ (B,), not negative.
        groups: m (B, G), 1 for members and 0 for others.

    Returns:
        A scalar; 0 where no group has a member.
    """
    losses = losses.float() if losses.element_size() < 4 else losses
    members = groups.to(losses.dtype)
    with torch.autocast(losses.device.type, enabled=False):
        sums = torch.stack([losses @ members, members.sum(dim=0)])
    totals, counts = sum_with_gradient(sums)
    return (totals / counts.clamp(min=1)).max()


def round_groups(rounds: Tensor, labels: Tensor) -> Tensor:
    r"""Two groups for every earlier round: what it predicted rightly, and what wrongly.

    .. math:: m_{ir} = [\hat y_i^r = y_i], \qquad m_{i, R + r} = 1 - m_{ir}

    Args:
        rounds: ŷ (B, R) int64, the classes that R rounds predicted.
        labels: y (B,) int64.

    Returns:
        (B, 2R) bool.
    """
    right = rounds == labels.unsqueeze(1)
    return torch.cat([right, ~right], dim=1)
