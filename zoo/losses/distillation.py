"""Distillation by softened outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0, squared: bool = True) -> Tensor:
    r"""The student's softened outputs match the teacher's.

    .. math:: L = T^2 \cdot \tfrac1B \sum_i \sum_c q_{ic} \log \frac{q_{ic}}{p_{ic}},
              \quad q = \mathrm{softmax}(v / T), \; p = \mathrm{softmax}(z / T)

    The paper minimises the soft cross-entropy :math:`-\sum_c q_c \log p_c`, which differs by the teacher's entropy:
    a constant, so the gradient :math:`T (p - q) / B` is the same, and the divergence is zero when both agree.
    For :math:`T \to \infty` the loss tends to :math:`\tfrac{1}{2BC} \sum (\bar z - \bar v)^2` on centred logits.

    Args:
        student: logits z (B, C); gradients flow here.
        teacher: logits v (B, C); detached.
        temperature: T > 0. It is applied in 32 bits (64 for doubles), whatever the precision of the logits.
        squared: multiply by T², which keeps the size of the gradients when T changes.

    Returns:
        A scalar: the mean over the batch of the sum over classes.

    Raises:
        ValueError: T is not positive, or the two have different shapes.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2 and eq. 2-4.
    """
    if temperature <= 0:
        raise ValueError(f"distillation_loss: temperature={temperature}, but it must be positive")
    if student.shape != teacher.shape:
        raise ValueError(
            f"distillation_loss: student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} "
            "must have one shape; were both built for the same classes?"
        )
    if student.shape[0] == 0:
        return student.sum()
    log_p = F.log_softmax(_at_least_32_bits(student) / temperature, dim=1)
    log_q = F.log_softmax(_at_least_32_bits(teacher.detach()) / temperature, dim=1)
    divergence = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return temperature**2 * divergence if squared else divergence


def _at_least_32_bits(x: Tensor) -> Tensor:
    """Half precision loses a third of the loss in the softmax's tail."""
    return x.float() if x.element_size() < 4 else x
