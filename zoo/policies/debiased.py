"""Pseudo-labels without the preference that the network has for some classes."""

from typing import Any

import torch
from torch import Tensor

from zoo.core.distributed import mean_across_ranks
from zoo.core.errors import UserError
from zoo.policies.policy import Policy


class DebiasedThreshold(Policy):
    r"""Confident predictions after the running marginal is taken out of the logits.

    .. math:: w = \mathbb 1[\max_c \tilde p_c \ge \tau], \quad
        \tilde p = \mathrm{softmax}(z - \lambda \log \hat q), \quad
        \hat q \leftarrow m\, \hat q + (1 - m)\, \mathbb{E}_B\, \mathrm{softmax}(z)

    :math:`\hat q` starts uniform, takes the mean over all ranks, and moves after it was used, as in the released code.
    :attr:`margin` :math:`\lambda \log \hat q`, after the move, is what a method adds to the strong views' logits.

    Args:
        num_classes: number of classes C.
        threshold: :math:`\tau` in (0, 1].
        strength: :math:`\lambda` ≥ 0; 0 is the plain threshold. The released scripts take 0.4, others up to 3.
        momentum: :math:`m` in [0, 1).

    Raises:
        UserError: if an argument is out of its range.

    Source: Wang et al. 2022, arXiv 2201.01490: adaptive debiasing.
    """

    marginal: Tensor

    def __init__(
        self, num_classes: int, threshold: float = 0.95, strength: float = 0.4, momentum: float = 0.999
    ) -> None:
        super().__init__()
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"DebiasedThreshold: threshold={threshold} must lie in (0, 1]")
        if strength < 0.0:
            raise UserError(f"DebiasedThreshold: strength={strength} must not be negative")
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"DebiasedThreshold: momentum={momentum} must lie in [0, 1)")
        self.threshold, self.strength, self.momentum = threshold, strength, momentum
        self.register_buffer("marginal", torch.full((num_classes,), 1.0 / num_classes))

    @property
    def margin(self) -> Tensor:
        r""":math:`\lambda \log \hat q` (C,)."""
        return self.strength * self.marginal.clamp_min(1e-12).log()

    def thresholds(self) -> Tensor:
        """The same for every class (C,), of the debiased confidence."""
        return torch.full_like(self.marginal, self.threshold)

    def forward(self, logits: Tensor, **evidence: Any) -> tuple[Tensor, Tensor]:
        """Targets (B,) and weights (B,) of 0 and 1."""
        plain = logits.detach().float()
        confidence, label = (plain - self.margin).softmax(dim=1).max(dim=1)
        if self.training:
            batch = mean_across_ranks(plain.softmax(dim=1).mean(dim=0))
            self.marginal = torch.lerp(batch, self.marginal, self.momentum)
        return label, (confidence >= self.threshold).to(logits.dtype)
