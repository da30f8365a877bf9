"""Keep the predictions that are confident enough."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.policies.alignment import Alignment
from zoo.policies.policy import Policy


class Threshold(Policy):
    r"""Targets from probabilities that reach a fixed threshold.

    .. math:: w = \mathbb 1[\max_c \tilde p_c \ge \tau], \quad \tilde p = \mathrm{align}(\mathrm{softmax}(z)), \quad
        \hat q = \mathrm{normalize}(\tilde p^{\,1 / T})

    The confidence is that before sharpening, as in the released code of FixMatch, UDA and ReMixMatch.

    Args:
        num_classes: number of classes C; must not be below 2, where every prediction is certain.
        threshold: :math:`\tau` in (0, 1].
        temperature: :math:`T` > 0 of soft targets; below 1 sharpens.
        soft: whether targets stay probabilities (B, C) instead of the most probable class (B,).
        alignment: from the number of classes to an :class:`~zoo.policies.alignment.Alignment`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Sohn et al. 2020, arXiv 2001.07685, section 2.2; soft targets and temperature as in UDA, arXiv 1904.12848.
    """

    def __init__(
        self,
        num_classes: int,
        threshold: float = 0.95,
        temperature: float = 1.0,
        soft: bool = False,
        alignment: Callable[[int], Alignment] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"Threshold: num_classes={num_classes} must be at least 2")
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"Threshold: threshold={threshold} must lie in (0, 1]")
        if temperature <= 0.0:
            raise UserError(f"Threshold: temperature={temperature} must be positive")
        self.num_classes, self.threshold, self.temperature, self.soft = num_classes, threshold, temperature, soft
        self.alignment = alignment(num_classes) if alignment else Alignment()

    def thresholds(self) -> Tensor:
        """The same for every class (C,)."""
        return torch.full((self.num_classes,), self.threshold)

    def forward(self, logits: Tensor, **evidence: Any) -> tuple[Tensor, Tensor]:
        """Targets (B,) or (B, C), and weights (B,) of 0 and 1."""
        probabilities = self.alignment(logits.detach().float().softmax(dim=1), **evidence)
        confidence, label = probabilities.max(dim=1)
        weights = (confidence >= self.threshold).to(logits.dtype)
        if not self.soft:
            return label, weights
        sharpened = (
            (probabilities.log() / self.temperature).softmax(dim=1) if self.temperature != 1.0 else probabilities
        )
        return sharpened, weights
