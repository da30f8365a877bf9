r"""Schedules as pure functions of progress :math:`p \in [0, 1]`, and learning rates made of them."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_ramp(progress: float, length: float = 1.0) -> float:
    """From 0 to 1 over the first ``length`` of training, then 1. ``length`` 0 is always 1."""
    return 1.0 if length <= 0 else min(max(progress / length, 0.0), 1.0)


def sigmoid_ramp(progress: float, length: float = 1.0) -> float:
    r""":math:`e^{-5(1 - t)^2}` with :math:`t` the linear ramp (Laine and Aila 2017, arXiv 1610.02242)."""
    return math.exp(-5.0 * (1.0 - linear_ramp(progress, length)) ** 2)


def dann_ramp(progress: float, sharpness: float = 10.0) -> float:
    r""":math:`2 / (1 + e^{-\gamma p}) - 1`, from 0 towards 1 (Ganin et al. 2016, arXiv 1505.07818, section 5.2)."""
    return 2.0 / (1.0 + math.exp(-sharpness * progress)) - 1.0


def cosine_decay(progress: float, cycles: float = 0.5, floor: float = 0.0) -> float:
    r"""From 1 down to ``floor`` along a cosine: :math:`f + (1 - f) \max(0, g(p))`.

    Half a cycle is the usual annealing :math:`g = \tfrac12 (1 + \cos \pi p)`; any other number of cycles :math:`c` is
    the plain :math:`g = \cos(2 \pi c p)`. FixMatch decays by :math:`\cos(7 \pi p / 16)`, that is ``cycles=7/32``.
    """
    value = 0.5 * (1.0 + math.cos(math.pi * progress)) if cycles == 0.5 else math.cos(2.0 * math.pi * cycles * progress)
    return floor + (1.0 - floor) * max(0.0, value)


class ProgressLR(LambdaLR):
    """A learning rate that is a function of the completed fraction of training.

    Args:
        optimizer: whose rates are scaled.
        total_steps: optimizer steps of the whole run; ``None`` lets :class:`~zoo.core.method.Method` fill in the run's.
        warmup_steps: steps of linear warm-up from 0, before the schedule counts.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int | None = None, warmup_steps: int = 0) -> None:
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, self._scale)

    def _scale(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        length = (self.total_steps or 0) - self.warmup_steps
        return self.factor(min((step - self.warmup_steps) / length, 1.0) if length > 0 else 0.0)

    def factor(self, progress: float) -> float:
        """The learning rate at ``progress`` in [0, 1], as a multiple of the base rate: constant unless overridden."""
        del progress
        return 1.0


class CosineLR(ProgressLR):
    """Cosine decay of the learning rate, see :func:`cosine_decay`.

    Args:
        optimizer: whose rates are scaled.
        total_steps: optimizer steps of the whole run; ``None`` takes the run's own.
        warmup_steps: steps of linear warm-up from 0.
        cycles: 0.5 ends at the floor; FixMatch's published 7/32 ends at 0.195.
        floor: the smallest multiple of the base rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        cycles: float = 0.5,
        floor: float = 0.0,
    ) -> None:
        self.cycles, self.floor = cycles, floor
        super().__init__(optimizer, total_steps, warmup_steps)

    def factor(self, progress: float) -> float:
        """The cosine at ``progress``."""
        return cosine_decay(progress, self.cycles, self.floor)


class PolynomialDecayLR(ProgressLR):
    r""":math:`(1 - p)^{power}`, the usual decay in segmentation.

    Args:
        optimizer: whose rates are scaled.
        total_steps: optimizer steps of the whole run; ``None`` takes the run's own.
        warmup_steps: steps of linear warm-up from 0.
        power: the exponent.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int | None = None, warmup_steps: int = 0, power: float = 0.9
    ) -> None:
        self.power = power
        super().__init__(optimizer, total_steps, warmup_steps)

    def factor(self, progress: float) -> float:
        """The polynomial at ``progress``."""
        return (1.0 - progress) ** self.power


class InverseDecayLR(ProgressLR):
    r""":math:`(1 + \alpha p)^{-\beta}`, the decay of DANN (Ganin et al. 2016, arXiv 1505.07818, section 5.2).

    Args:
        optimizer: whose rates are scaled.
        total_steps: optimizer steps of the whole run; ``None`` takes the run's own.
        warmup_steps: steps of linear warm-up from 0.
        alpha: how early the decay begins.
        beta: how steep it is.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        alpha: float = 10.0,
        beta: float = 0.75,
    ) -> None:
        self.alpha, self.beta = alpha, beta
        super().__init__(optimizer, total_steps, warmup_steps)

    def factor(self, progress: float) -> float:
        """The decay at ``progress``."""
        return (1.0 + self.alpha * progress) ** -self.beta
