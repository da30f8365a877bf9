"""How wrong pseudo-labels could be: a head that fits the labels and contradicts the pseudo-labels."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def worst_case_loss(
    labeled: Tensor, labels: Tensor, unlabeled: Tensor, pseudo_labels: Tensor, labeled_weight: float = 2.0
) -> Tensor:
    r"""What the worst head on given features minimises, and the features maximise.

    .. math:: L = \eta' \tfrac1B \sum_b -\log q_{y_b}(x_b) + \tfrac1{\mu B} \sum_b -\log\big(1 - q_{\hat y_b}(u_b)\big)

    The second term is finite and has a gradient wherever logits are: :math:`\log(1 - q_y)` is the log of the other
    classes' sum. (The released code adds 1e-6 inside the logarithm instead.)

    Args:
        labeled: logits (B, C) of the worst head on labeled samples.
        labels: y (B,).
        unlabeled: logits (μB, C) of the worst head on unlabeled samples.
        pseudo_labels: ŷ (μB,), of the main head.
        labeled_weight: η' ≥ 0.

    Returns:
        A scalar ≥ 0.

    Source: Chen et al. 2022, arXiv 2202.07136, section 4.2.
    """
    z = unlabeled.float() if unlabeled.element_size() < 4 else unlabeled
    own = torch.zeros_like(z, dtype=torch.bool).scatter(1, pseudo_labels.unsqueeze(1), True)
    others = z.masked_fill(own, -torch.inf).logsumexp(dim=1)
    return labeled_weight * cross_entropy(labeled, labels) + (z.logsumexp(dim=1) - others).mean()
