"""CReST: pseudo-labels of rare classes count more than those of frequent ones.

Wei et al., CVPR 2021, https://arxiv.org/abs/2102.09559
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from zoo.core.distributed import sum_across_ranks
from zoo.core.errors import UserError
from zoo.policies.alignment import MovingAlignment
from zoo.policies.policy import Policy
from zoo.policies.threshold import Threshold


class LabelFrequencies(nn.Module):
    """How often each class was seen among the labeled samples of all ranks so far; it starts with one of each.

    Args:
        num_classes: number of classes C.
    """

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.ones(num_classes))

    def forward(self, labeled: tuple[Tensor, Tensor] | None = None, **evidence: Any) -> Tensor:
        """Frequencies (C,), after the labels of this step where it is one of training."""
        if self.training and labeled is not None:
            seen = one_hot(labeled[1], len(self.counts)).sum(dim=0).to(self.counts.dtype)
            self.counts = self.counts + sum_across_ranks(seen)
        return self.counts / self.counts.sum()


class Rebalanced(Policy):
    r"""Another policy, whose pseudo-labels of frequent classes count less.

    .. math:: w'_b = w_b \, \mu_{\hat q_b}, \qquad \mu_l = \Big( \frac{n_{C + 1 - l}}{n_1} \Big)^{\alpha}

    with the classes in the order of their labeled samples, :math:`n_1 \ge \dots \ge n_C`: the rarest class is kept
    whole, the most frequent with the rate at which the rarest was found among it. The paper keeps the most confident
    share :math:`\mu_l` of each class when it labels the set anew for another generation of training; in a batch every
    sample has the rate as its weight, which is that selection in the mean, without its noise.

    Args:
        num_classes: number of classes C.
        policy: from the number of classes to the policy that is rebalanced.
        power: :math:`\alpha` ≥ 0; 0 changes nothing. The paper's is 1/3.

    Raises:
        UserError: if ``power`` is negative.

    Source: Wei et al. 2021, arXiv 2102.09559, section 3.2.
    """

    def __init__(self, num_classes: int, policy: Callable[[int], Policy] = Threshold, power: float = 1 / 3) -> None:
        super().__init__()
        if power < 0.0:
            raise UserError(f"Rebalanced: power={power} must not be negative")
        self.power = power
        self.policy = policy(num_classes)
        self.frequencies = LabelFrequencies(num_classes)

    def forward(self, logits: Tensor, **evidence: Any) -> tuple[Tensor, Tensor]:
        """The policy's targets, (B,) or (B, C), and its weights (B,) times the rates of their classes."""
        targets, weights = self.policy(logits, **evidence)
        classes = targets if targets.ndim == 1 else targets.argmax(dim=1)
        return targets, weights * self.rates(self.frequencies(**evidence))[classes].to(weights.dtype)

    def rates(self, frequencies: Tensor) -> Tensor:
        r""":math:`\mu` (C,), from the frequencies (C,) of the classes."""
        falling, order = frequencies.sort(descending=True, stable=True)
        return torch.zeros_like(falling).scatter(0, order, (falling.flip(0) / falling[0]) ** self.power)

    def thresholds(self) -> Tensor | None:
        """Those of the policy."""
        return self.policy.thresholds()


class TemperedAlignment(MovingAlignment):
    r"""Alignment with the frequencies of the labels, made more even.

    .. math:: \tilde p = \mathrm{normalize}\!\left(p \cdot \frac{\pi^{t}}{\bar p}\right), \qquad
        t = 1 - (1 - t_{\min}) \min(1, k / K)

    at step k. t = 1 aligns with the labels' own frequencies :math:`\pi`, t = 0 with even ones. The frequencies are
    counted from the labeled samples of the steps; what is aligned moves before it is used.

    Args:
        num_classes: number of classes C.
        temperature: :math:`t_{\min}` in [0, 1]; the paper's is 0.5.
        ramp_steps: K ≥ 0, steps over which t falls from 1; 0 is :math:`t_{\min}` from the start. The paper lowers it
            from generation to generation.
        momentum: of the moving mean :math:`\bar p`, in [0, 1).

    Raises:
        UserError: if an argument is out of its range; in training where no labeled samples are given.

    Source: Wei et al. 2021, arXiv 2102.09559, section 3.3 (CReST+).
    """

    steps: Tensor

    def __init__(
        self, num_classes: int, temperature: float = 0.5, ramp_steps: int = 0, momentum: float = 0.999
    ) -> None:
        super().__init__(num_classes, momentum)
        if not 0.0 <= temperature <= 1.0:
            raise UserError(f"TemperedAlignment: temperature={temperature} must lie in [0, 1]")
        if ramp_steps < 0:
            raise UserError(f"TemperedAlignment: ramp_steps={ramp_steps} must not be negative")
        self.temperature, self.ramp_steps = temperature, ramp_steps
        self.frequencies = LabelFrequencies(num_classes)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, probabilities: Tensor, **evidence: Any) -> Tensor:
        """Aligned probabilities (B, C), rows summing to 1."""
        if self.training:
            if evidence.get("labeled") is None:
                raise UserError("TemperedAlignment: it needs labeled=(logits, labels) of the step")
            fallen = (self.steps / self.ramp_steps).clamp(max=1) if self.ramp_steps else 1.0
            tempered = self.frequencies(**evidence) ** (1 - (1 - self.temperature) * fallen)
            self.prior = tempered / tempered.sum()
            self.steps = self.steps + 1
        return super().forward(probabilities, **evidence)
