"""How much two classifiers differ."""

from __future__ import annotations

from torch import Tensor

from zoo.core.distributed import sum_with_gradient, world_size


def classifier_discrepancy(first: Tensor, second: Tensor) -> Tensor:
    r"""Mean absolute difference of two heads' probabilities, in [0, 2 / C].

    .. math:: d(p, p') = \tfrac1{B C} \sum_{b,c} |p_{bc} - p'_{bc}|

    Args:
        first: logits (B, C); taken to 32 bits or more.
        second: logits (B, C).

    Source: Saito et al. 2018, arXiv 1712.02560, section 3.
    """
    return (_probabilities(first) - _probabilities(second)).abs().mean()


def class_balance_loss(logits: Tensor) -> Tensor:
    r"""Small where all classes are predicted alike over the batch, and log C at least.

    .. math:: -\tfrac1C \sum_c \log \bar p_c, \qquad \bar p = \tfrac1B \sum_b p_b

    :math:`\bar p` is that of all ranks.

    Args:
        logits: (B, C); taken to 32 bits or more.

    Source: Saito et al. 2018, arXiv 1712.02560, as in TLlib's MCD.
    """
    mean = sum_with_gradient(_probabilities(logits).mean(dim=0)) / world_size()
    return -(mean + 1e-6).log().mean()


def _probabilities(logits: Tensor) -> Tensor:
    return (logits.float() if logits.element_size() < 4 else logits).softmax(dim=1)
