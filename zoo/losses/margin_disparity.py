"""How much two classifiers disagree, with a margin."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def margin_disparity_loss(
    source: Tensor, source_adversary: Tensor, target: Tensor, target_adversary: Tensor, margin: float = 4.0
) -> Tensor:
    r"""What an adversarial head minimises that agrees with the main head on the source, but not on the target.

    .. math:: \frac{\gamma}{B_s} \sum_i -\log p'(\hat y_i \mid x_i^s) + \frac1{B_t} \sum_j -\log(1 - p'(\hat y_j \mid
        x_j^t)), \qquad \hat y = \arg\max_y h(x)_y

    It is minus the margin disparity discrepancy, and never negative. :math:`\log (1 - p)` is computed from the other
    classes' logits, so it is exact where p rounds to 1; TLlib adds 1e-6, and has no gradient there.

    Args:
        source: logits of the main head (B_s, C), C ≥ 2; only which is largest counts.
        source_adversary: logits of the adversarial head (B_s, C).
        target: (B_t, C).
        target_adversary: (B_t, C).
        margin: γ.

    Returns:
        A scalar without a gradient for the main head.

    Source: Zhang et al. 2019, arXiv 1904.05801, the combined cross-entropy losses.
    """
    if target_adversary.element_size() < 4:
        source_adversary, target_adversary = source_adversary.float(), target_adversary.float()
    predicted = torch.zeros_like(target_adversary, dtype=torch.bool).scatter(1, target.argmax(1, keepdim=True), True)
    others = target_adversary.masked_fill(predicted, -torch.inf).logsumexp(dim=1)
    disagreement = (target_adversary.logsumexp(dim=1) - others).mean()
    return margin * cross_entropy(source_adversary, source.argmax(dim=1)) + disagreement
