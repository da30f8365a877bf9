"""Logits shifted by how frequent their classes are."""

from __future__ import annotations

from torch import Tensor

from zoo.core.errors import UserError


def adjust_logits(logits: Tensor, counts: Tensor, tau: float = 1.0) -> Tensor:
    r"""Logits that already know the class frequencies.

    .. math:: z'_c = z_c + \tau \log \pi_c, \qquad \pi_c = n_c / \sum_j n_j

    The cross-entropy of :math:`z'` fits the frequent classes by the shift, so that :math:`z` itself minimises the error
    averaged over classes. A negative τ takes the frequencies out of logits that were trained without it.

    Args:
        logits: z (B, C).
        counts: samples of each class :math:`n` (C,); a class without one counts as having one.
        tau: :math:`\tau`.

    Returns:
        (B, C), in 32 bits at least. Uniform counts shift all logits alike, which no softmax sees.

    Raises:
        UserError: if there are not C counts.

    Source: Menon et al. 2020, arXiv 2007.07314, equations 9 and 10.
    """
    if counts.shape != logits.shape[1:]:
        raise UserError(f"adjust_logits: {counts.numel()} counts do not go with {logits.shape[1]} classes")
    logits = logits if logits.element_size() >= 4 else logits.float()
    counts = counts.to(logits.dtype).clamp_min(1)
    return logits + tau * (counts / counts.sum()).log()
