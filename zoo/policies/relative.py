"""A threshold relative to how confident the network is on labeled samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.core.distributed import mean_across_ranks
from zoo.core.errors import UserError
from zoo.policies.alignment import Alignment, LabeledAlignment
from zoo.policies.policy import Policy


class RelativeThreshold(Policy):
    r"""Predictions that are nearly as confident as those on the labeled samples of the step.

    .. math:: w = \mathbb 1[\max_c \tilde p_c \ge c_\tau], \quad
        c_\tau = \tau \cdot \tfrac1B \sum_b \max_c p_c(x_b), \quad \tilde p = \mathrm{align}(p(u))

    The labeled predictions are those of the weak view, not aligned; their mean runs over all ranks. Targets are the
    most probable classes of the aligned predictions.

    Args:
        num_classes: number of classes C.
        threshold: :math:`\tau` in (0, 1].
        alignment: from the number of classes to an :class:`~zoo.policies.alignment.Alignment`; ``None`` = none.

    Raises:
        UserError: if ``threshold`` is outside (0, 1]; in :meth:`forward` where no labeled logits are given.

    Source: Berthelot et al. 2022, arXiv 2106.04732: relative confidence threshold.
    """

    relative: Tensor

    def __init__(
        self,
        num_classes: int,
        threshold: float = 0.9,
        alignment: Callable[[int], Alignment] | None = LabeledAlignment,
    ) -> None:
        super().__init__()
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"RelativeThreshold: threshold={threshold} must lie in (0, 1]")
        self.num_classes, self.threshold = num_classes, threshold
        self.alignment = alignment(num_classes) if alignment else Alignment()
        self.register_buffer("relative", torch.tensor(threshold))  # c_τ of the last step, to be looked at

    def forward(
        self, logits: Tensor, labeled: tuple[Tensor, Tensor] | None = None, **evidence: Any
    ) -> tuple[Tensor, Tensor]:
        """Targets (B,) and weights (B,) of 0 and 1; ``labeled`` holds the labeled samples' logits and labels."""
        if labeled is None:
            raise UserError("RelativeThreshold: it needs labeled=(logits, labels) of the step")
        confident = labeled[0].detach().float().softmax(dim=1).amax(dim=1).mean()
        relative = self.threshold * mean_across_ranks(confident)
        if self.training:
            self.relative = relative
        probabilities = self.alignment(logits.detach().float().softmax(dim=1), labeled=labeled, **evidence)
        confidence, label = probabilities.max(dim=1)
        return label, (confidence >= relative).to(logits.dtype)

    def thresholds(self) -> Tensor:
        r"""The threshold :math:`c_\tau` of the last step, the same for every class (C,)."""
        return self.relative.expand(self.num_classes)
