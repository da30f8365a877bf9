"""A bound on the loss of the pseudo-label, which falls as training goes on."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.distributed import mean_across_ranks
from zoo.core.errors import UserError
from zoo.policies.policy import Policy


class DynamicThreshold(Policy):
    r"""Pseudo-labels whose loss is not above that of the labeled samples, and less and less so.

    .. math:: w = \mathbb 1[-\log \max_c p_c \le \rho_k], \quad
        \rho_k = \max(\rho_{\min},\; C\, \gamma^{-k}\, \hat\rho), \quad k = \lfloor (t - t_0) / T \rfloor

    Until step :math:`t_0` only labels are learned (weights 0); :math:`\hat\rho` is the mean labeled cross-entropy over
    the last ``window`` steps of that warm-up, over all ranks. Targets are sharpened probabilities (B, C) while
    :math:`\rho_k` falls, and the most probable class, one-hot, once it is at its minimum.

    The released code takes :math:`\hat\rho` from the unlabeled loss and USB from the test set; the paper and this
    class from the labeled loss. The default lengths are those of the released script: 10 and 9 epochs of 1024 steps.

    Args:
        num_classes: number of classes.
        warmup_steps: :math:`t_0` ≥ 1.
        window: steps of the warm-up, the last ones, over which :math:`\hat\rho` is a mean.
        period: :math:`T`, steps between two falls.
        decay: :math:`\gamma` > 1.
        scale: :math:`C` > 0, slightly above 1.
        minimum: :math:`\rho_{\min}` ≥ 0; 0.05 is a confidence of 0.95.
        temperature: of the soft targets, > 0; below 1 sharpens.

    Raises:
        UserError: if an argument is out of its range; in :meth:`forward` where no labeled logits are given.

    Source: Xu et al. 2021, arXiv 2109.00650, algorithm 1.
    """

    steps: Tensor
    labeled_loss: Tensor

    def __init__(
        self,
        num_classes: int,
        warmup_steps: int = 10240,
        window: int = 1024,
        period: int = 9216,
        decay: float = 1.27,
        scale: float = 1.0001,
        minimum: float = 0.05,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        for name, value in {"warmup_steps": warmup_steps, "window": window, "period": period}.items():
            if value < 1:
                raise UserError(f"DynamicThreshold: {name}={value} must be at least 1")
        for name, bound in {"scale": scale, "temperature": temperature}.items():
            if bound <= 0.0:
                raise UserError(f"DynamicThreshold: {name}={bound} must be positive")
        if decay <= 1.0:
            raise UserError(f"DynamicThreshold: decay={decay} must be above 1")
        if minimum < 0.0:
            raise UserError(f"DynamicThreshold: minimum={minimum} must not be negative")
        self.num_classes, self.warmup_steps, self.window, self.period = num_classes, warmup_steps, window, period
        self.decay, self.scale, self.minimum, self.temperature = decay, scale, minimum, temperature
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("labeled_loss", torch.zeros(()))  # the sum over the window

    def forward(
        self, logits: Tensor, labeled: tuple[Tensor, Tensor] | None = None, **evidence: Any
    ) -> tuple[Tensor, Tensor]:
        """Targets (B, C) and weights (B,) of 0 and 1; ``labeled`` holds the labeled samples' logits and labels."""
        if labeled is None:
            raise UserError("DynamicThreshold: it needs labeled=(logits, labels) of the step")
        logits = logits.detach().float()
        bound, warm = self.bound(), self.steps >= self.warmup_steps
        if self.training:
            loss = mean_across_ranks(cross_entropy(labeled[0].detach().float(), labeled[1]))
            counted = ~warm & (self.steps >= self.warmup_steps - self.window)
            self.labeled_loss = self.labeled_loss + counted * loss
            self.steps = self.steps + 1
        loss, label = (-logits.log_softmax(dim=1)).min(dim=1)
        hard = torch.zeros_like(logits).scatter(1, label[:, None], 1.0)
        targets = torch.where(bound <= self.minimum, hard, (logits / self.temperature).softmax(dim=1))
        return targets, ((loss <= bound) & warm).float()

    def bound(self) -> Tensor:
        r""":math:`\rho_k`, a scalar; that at the warm-up's end stands for the warm-up, as far as it is known."""
        falls = (self.steps - self.warmup_steps).clamp_min(0) // self.period
        start = self.labeled_loss / min(self.window, self.warmup_steps)
        return (self.scale * start * self.decay ** -falls.float()).clamp_min(self.minimum)

    def thresholds(self) -> Tensor:
        r"""The confidence :math:`e^{-\rho_k}` that the bound amounts to, the same for every class (C,)."""
        return (-self.bound()).exp().expand(self.num_classes)
