"""Distribution alignment: predictions are scaled so that their long-run mean is a given prior."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.distributed import mean_across_ranks
from zoo.core.errors import UserError


class Alignment(nn.Module):
    """Base of the alignments: probabilities (B, C) → probabilities (B, C).

    They are handed what the policies are, see :class:`~zoo.policies.policy.Policy`.
    """

    def forward(self, probabilities: Tensor, **evidence: Any) -> Tensor:
        """Change nothing."""
        return probabilities


class MovingAlignment(Alignment):
    r"""Alignment by the moving average of the predictions.

    .. math:: \tilde p = \mathrm{normalize}\!\left(p \cdot \frac{\pi}{\bar p}\right), \quad
        \bar p \leftarrow m\, \bar p + (1 - m)\, \mathbb{E}_B\, p

    :math:`\bar p` starts at the prior, moves before it is used, takes the mean over all ranks, and moves only in
    training mode. The prior :math:`\pi` is uniform unless given.

    Args:
        num_classes: number of classes C.
        momentum: :math:`m` in [0, 1).
        prior: class frequencies to align with, C non-negative numbers that are normalised to sum to 1.

    Raises:
        UserError: if ``prior`` has another length than C, or a negative entry.

    Source: Berthelot et al. 2020, arXiv 1911.09785, section 3.1, with the moving average of Sohn et al. 2020.
    """

    prior: Tensor
    mean: Tensor

    def __init__(self, num_classes: int, momentum: float = 0.999, prior: list[float] | None = None) -> None:
        super().__init__()
        if prior is not None and (len(prior) != num_classes or min(prior) < 0 or sum(prior) <= 0):
            raise UserError(f"MovingAlignment: prior={prior} must be {num_classes} non-negative numbers")
        self.momentum = momentum
        frequencies = torch.tensor(prior) if prior is not None else torch.ones(num_classes)
        self.register_buffer("prior", frequencies / frequencies.sum())
        self.register_buffer("mean", self.prior.clone())

    def forward(self, probabilities: Tensor, **evidence: Any) -> Tensor:
        """Aligned probabilities (B, C), rows summing to 1."""
        if self.training:
            batch_mean = mean_across_ranks(probabilities.detach().mean(dim=0)).to(self.mean.dtype)
            # A new tensor, not an update in place: DDP may still hold the old one for its buffer broadcast.
            self.mean = torch.lerp(batch_mean, self.mean, self.momentum)
        scaled = probabilities * (self.prior / self.mean.clamp_min(1e-6))
        return scaled / scaled.sum(dim=1, keepdim=True)
