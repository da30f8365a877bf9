"""A global threshold that follows the confidence, scaled for each class by how often it is predicted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.core.distributed import mean_across_ranks
from zoo.core.errors import UserError
from zoo.policies.alignment import Alignment
from zoo.policies.policy import Policy


class SelfAdaptiveThreshold(Policy):
    r"""The threshold is the running confidence, lower for classes that are predicted less.

    .. math:: w = \mathbb 1\left[\max_c p_c \ge \frac{\tilde p_t(\hat y)}{\max_k \tilde p_t(k)}\, \tau_t\right], \quad
        \tau_t = m \tau_{t-1} + (1 - m)\, \mathbb E_B \max_c p_c, \quad
        \tilde p_t = m \tilde p_{t-1} + (1 - m)\, \mathbb E_B\, p

    Both start at 1/C and move before they are used. :attr:`histogram` :math:`\tilde h_t` is the like average of the
    shares of the predicted classes, for :func:`~zoo.losses.fairness.fairness_loss`. Means run over all ranks.

    Args:
        num_classes: number of classes C.
        momentum: :math:`m` in [0, 1).
        maximum: upper bound of :math:`\tau_t`; USB takes 0.95 on SVHN and none elsewhere. The code of the paper's
            figures keeps the thresholds of the classes of SVHN within [0.9, 0.95] instead, which is not here.
        alignment: from the number of classes to an :class:`~zoo.policies.alignment.Alignment`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Wang et al. 2023, arXiv 2205.07246, equations 5 to 8.
    """

    global_threshold: Tensor
    mean: Tensor
    histogram: Tensor

    def __init__(
        self,
        num_classes: int,
        momentum: float = 0.999,
        maximum: float | None = None,
        alignment: Callable[[int], Alignment] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"SelfAdaptiveThreshold: momentum={momentum} must lie in [0, 1)")
        if maximum is not None and not 0.0 < maximum <= 1.0:
            raise UserError(f"SelfAdaptiveThreshold: maximum={maximum} must lie in (0, 1]")
        self.momentum, self.maximum = momentum, maximum
        self.alignment = alignment(num_classes) if alignment else Alignment()
        uniform = torch.full((num_classes,), 1.0 / num_classes)
        self.register_buffer("global_threshold", uniform[0].clone())
        self.register_buffer("mean", uniform.clone())
        self.register_buffer("histogram", uniform.clone())

    def forward(self, logits: Tensor, **evidence: Any) -> tuple[Tensor, Tensor]:
        """Targets (B,) and weights (B,) of 0 and 1."""
        probabilities = self.alignment(logits.detach().float().softmax(dim=1), **evidence)
        confidence, label = probabilities.max(dim=1)
        if self.training:
            self._move(probabilities, confidence, label)
        return label, (confidence >= self.thresholds()[label]).to(logits.dtype)

    def thresholds(self) -> Tensor:
        r"""The thresholds :math:`\tau_t\, \tilde p_t / \max \tilde p_t` (C,)."""
        return self.global_threshold * (self.mean / self.mean.max())

    def _move(self, probabilities: Tensor, confidence: Tensor, label: Tensor) -> None:
        """Move the three averages; one message for all of them."""
        classes = self.mean.numel()
        shares = torch.zeros_like(self.mean).scatter_add(0, label, torch.full_like(confidence, 1.0 / len(label)))
        batch = mean_across_ranks(torch.cat([probabilities.mean(dim=0), shares, confidence.mean()[None]]))
        mean, histogram, threshold = batch.split([classes, classes, 1])
        self.mean = torch.lerp(mean, self.mean, self.momentum)
        self.histogram = torch.lerp(histogram, self.histogram, self.momentum)
        moved = torch.lerp(threshold[0], self.global_threshold, self.momentum)
        self.global_threshold = moved if self.maximum is None else moved.clamp_max(self.maximum)
