"""The squared distance of two predictions."""

from torch import Tensor


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Mean squared difference of probabilities.

    .. math:: L = \tfrac{1}{BC} \sum_b \lVert \mathrm{softmax}(z_b) - q_b \rVert^2 \in [0, \tfrac2C]

    The mean runs over samples and classes, as in Laine and Aila 2017 (arXiv 1610.02242, algorithm 1) and Berthelot et
    al. 2019 (arXiv 1905.02249, equation 4): weights that papers quote are meant for this. Unlike the cross-entropy it
    is bounded, and stays small where a target is wrong.

    Args:
        logits: z (B, C); the softmax is taken in 32 bits or more.
        targets: q (B, C), probabilities.

    Returns:
        A scalar.
    """
    probabilities = (logits.float() if logits.element_size() < 4 else logits).softmax(dim=1)
    return (probabilities - targets.to(probabilities.dtype)).square().mean()
