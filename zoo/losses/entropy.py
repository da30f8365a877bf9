"""How undecided a prediction is."""

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    r"""Shannon entropy of every prediction, in nats.

    .. math:: H_b = -\sum_c p_{bc} \log p_{bc} \in [0, \log C], \quad p = \mathrm{softmax}(z)

    Its gradient vanishes both where a prediction is certain and where it is uniform.

    Args:
        logits: z (B, C); taken to 32 bits or more.

    Returns:
        H (B,).
    """
    log_p = (logits.float() if logits.element_size() < 4 else logits).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)
