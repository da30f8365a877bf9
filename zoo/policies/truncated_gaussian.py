"""Weights instead of a threshold: the less confident than usual, the less a sample counts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.core.distributed import sum_across_ranks
from zoo.core.errors import UserError
from zoo.policies.alignment import Alignment, MovingAlignment
from zoo.policies.policy import Policy


class TruncatedGaussian(Policy):
    r"""Every sample counts, by a Gaussian of its confidence that is cut off at the mean.

    .. math:: w = \exp\!\left(-\frac{n_\sigma^2 \min(\max_c \tilde p_c - \mu_t, 0)^2}{2 \sigma_t^2}\right), \quad
        \mu_t = m \mu_{t-1} + (1 - m)\, \mu_B, \quad \sigma_t^2 = m \sigma_{t-1}^2 + (1 - m)\, \sigma_B^2

    :math:`\tilde p` is aligned, to the uniform distribution unless another alignment is given, and only weights: the
    targets are those of the plain predictions. :math:`\mu_B` and the unbiased :math:`\sigma_B^2` are of the confidence
    over all ranks, from sums; :math:`\mu_0 = 1/C`, :math:`\sigma_0^2 = 1`. Both move before they are used.

    Args:
        num_classes: number of classes C.
        sigmas: :math:`n_\sigma` > 0; more narrows the Gaussian.
        momentum: :math:`m` in [0, 1).
        per_class: a mean and a variance for each predicted class; one of fewer than two samples keeps its own.
        aligned: take :math:`\mu_B` and :math:`\sigma_B` of the aligned confidence, as USB's code does; the paper and
            its first code take the plain one.
        alignment: from the number of classes to an :class:`~zoo.policies.alignment.Alignment`; ``None`` = none.

    Raises:
        UserError: if an argument is out of its range.

    Source: Chen et al. 2023, arXiv 2301.10921: truncated Gaussian function and uniform alignment.
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        num_classes: int,
        sigmas: float = 2.0,
        momentum: float = 0.999,
        per_class: bool = False,
        aligned: bool = False,
        alignment: Callable[[int], Alignment] | None = MovingAlignment,
    ) -> None:
        super().__init__()
        if sigmas <= 0.0:
            raise UserError(f"TruncatedGaussian: sigmas={sigmas} must be positive")
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"TruncatedGaussian: momentum={momentum} must lie in [0, 1)")
        self.num_classes, self.sigmas, self.momentum = num_classes, sigmas, momentum
        self.per_class, self.aligned = per_class, aligned
        self.alignment = alignment(num_classes) if alignment else Alignment()
        groups = num_classes if per_class else 1
        self.register_buffer("mean", torch.full((groups,), 1.0 / num_classes))
        self.register_buffer("variance", torch.ones(groups))

    def forward(self, logits: Tensor, **evidence: Any) -> tuple[Tensor, Tensor]:
        """Targets (B,), and weights (B,) in (0, 1]."""
        probabilities = logits.detach().float().softmax(dim=1)
        aligned, aligned_label = self.alignment(probabilities, **evidence).max(dim=1)
        confidence, label = probabilities.max(dim=1)
        if self.training:
            self._move(*((aligned, aligned_label) if self.aligned else (confidence, label)))
        group = aligned_label if self.per_class else torch.zeros_like(label)
        deficit = (aligned - self.mean[group]).clamp_max(0.0)
        # Where all are equally confident the variance tends to 0: then only they count.
        return label, (-0.5 * self.sigmas**2 * deficit**2 / self.variance[group].clamp_min(1e-12)).exp()

    def thresholds(self) -> Tensor:
        r"""The confidence :math:`\mu_t` (C,) from which on a sample counts in full."""
        return self.mean.expand(self.num_classes)

    def _move(self, confidence: Tensor, label: Tensor) -> None:
        """Move the mean and the variance by the batches of all ranks, group by group."""
        group = label if self.per_class else torch.zeros_like(label)
        offset = confidence - self.mean[group]  # from a near value, so that the squares do not cancel
        # A product by a mask adds up in one order on every device; scattered sums do not.
        members = group == torch.arange(self.mean.numel(), device=group.device)[:, None]
        powers = torch.stack([torch.ones_like(offset), offset, offset**2])
        count, first, second = sum_across_ranks((powers[:, None] * members).sum(dim=2)).unbind()
        mean = self.mean + first / count.clamp_min(1.0)
        variance = (second - first**2 / count.clamp_min(1.0)).clamp_min(0.0) / (count - 1.0).clamp_min(1.0)
        known = count >= 2.0
        moved = torch.lerp(mean, self.mean, self.momentum), torch.lerp(variance, self.variance, self.momentum)
        self.mean = torch.where(known, moved[0], self.mean)
        self.variance = torch.where(known, moved[1], self.variance)
