"""What is minimised on labeled samples: a small module, so that a criterion may know the class frequencies."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from zoo.core.errors import UserError
from zoo.losses.dice import dice_loss, self_adjusting_dice_loss
from zoo.losses.focal import focal_loss
from zoo.losses.logit_adjustment import adjust_logits


class Criterion(nn.Module):
    """Base of the criteria: logits (B, C) and labels (B,), or (B, C) where they are soft → the loss, a scalar.

    Args:
        num_classes: number of classes C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch."""
        raise NotImplementedError

    def prepare(self, counts: Tensor) -> None:
        """Be told, once before training, how many labeled samples each class has, (C,)."""


class CrossEntropy(Criterion):
    r""":math:`-\tfrac1B \sum_b \log p_{y_b}(x_b)`.

    Args:
        num_classes: number of classes C.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1).

    Raises:
        UserError: if ``label_smoothing`` is outside [0, 1).
    """

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__(num_classes)
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"CrossEntropy: label_smoothing={label_smoothing} must lie in [0, 1)")
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch."""
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


class LogitAdjusted(Criterion):
    r"""Cross-entropy of logits that already know the class frequencies.

    .. math:: L = -\tfrac1B \sum_b \log \mathrm{softmax}(z(x_b) + \tau \log \pi)_{y_b}

    The network's own logits, those that are evaluated and that label, are then right for balanced classes. The counts
    of the labeled samples come from the data before training starts and stay in the checkpoint; until then they are
    uniform, and this is the cross-entropy.

    Args:
        num_classes: number of classes C.
        tau: :math:`\tau` ≥ 0; 0 is the cross-entropy.
        label_smoothing: as of :class:`CrossEntropy`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Menon et al. 2020, arXiv 2007.07314, equation 10.
    """

    counts: Tensor

    def __init__(self, num_classes: int, tau: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(num_classes)
        if tau < 0.0:
            raise UserError(f"LogitAdjusted: tau={tau} must not be negative")
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"LogitAdjusted: label_smoothing={label_smoothing} must lie in [0, 1)")
        self.tau, self.label_smoothing = tau, label_smoothing
        self.register_buffer("counts", torch.ones(num_classes))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch."""
        return cross_entropy(adjust_logits(logits, self.counts, self.tau), labels, label_smoothing=self.label_smoothing)

    def prepare(self, counts: Tensor) -> None:
        """Take the class counts (C,)."""
        if counts.shape != self.counts.shape:
            raise UserError(f"LogitAdjusted: {counts.numel()} class counts, but num_classes={self.num_classes}")
        self.counts = counts.to(self.counts)


class Dice(Criterion):
    r"""One minus a soft F1 score of each class, pooled over the batch, in the sum over classes.

    .. math:: L = \sum_c 1 - \frac{2 \sum_b \tilde p_{bc} y_{bc} + \varepsilon}{\sum_b \tilde p_{bc} + \sum_b y_{bc}
        + \varepsilon}, \qquad \tilde p = (1 - p)^\alpha\, p

    Args:
        num_classes: number of classes C.
        smoothing: ε > 0.
        alpha: α ≥ 0, see :func:`~zoo.losses.dice_loss`.
        square_denominator: sums of squares below.
        detach_factor: no gradient through :math:`(1 - p)^\alpha`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Li et al. 2020, arXiv 1911.02855; form and defaults of the released code.
    """

    def __init__(
        self,
        num_classes: int,
        smoothing: float = 1e-4,
        alpha: float = 0.0,
        square_denominator: bool = False,
        detach_factor: bool = False,
    ) -> None:
        super().__init__(num_classes)
        if smoothing <= 0.0 or alpha < 0.0:
            name = type(self).__name__
            raise UserError(f"{name}: smoothing={smoothing} must be positive and alpha={alpha} not negative")
        self.smoothing, self.alpha = smoothing, alpha
        self.square_denominator, self.detach_factor = square_denominator, detach_factor

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over classes of the joint batch of all ranks."""
        return dice_loss(*self._both(logits, labels), **self._options()).sum()

    def _both(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and targets, (B, C) each."""
        targets = one_hot(labels, self.num_classes) if labels.ndim == 1 else labels
        return (logits if logits.element_size() >= 4 else logits.float()).softmax(dim=1), targets

    def _options(self) -> dict[str, Any]:
        names = ("smoothing", "alpha", "square_denominator", "detach_factor")
        return {name: getattr(self, name) for name in names}


class SelfAdjustingDice(Dice):
    r"""Dice of every sample by itself, in the sum over classes and the mean over the batch.

    .. math:: L = \tfrac1B \sum_b \sum_c 1 - \frac{2 \tilde p_{bc} y_{bc} + \varepsilon}{\tilde p_{bc} + y_{bc}
        + \varepsilon}, \qquad \tilde p = (1 - p)^\alpha\, p

    With the paper's factor :math:`\tilde p` falls again beyond :math:`p = 1 / (1 + \alpha)`: right predictions are
    pulled back to there. ``detach_factor`` keeps the weighting without that.

    Args:
        num_classes: number of classes C.
        smoothing: ε > 0.
        alpha: α ≥ 0.
        square_denominator: squares below.
        detach_factor: no gradient through :math:`(1 - p)^\alpha`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Li et al. 2020, arXiv 1911.02855, section 3.3.
    """

    def __init__(
        self,
        num_classes: int,
        smoothing: float = 1.0,
        alpha: float = 1.0,
        square_denominator: bool = False,
        detach_factor: bool = False,
    ) -> None:
        super().__init__(num_classes, smoothing, alpha, square_denominator, detach_factor)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch of the sums over classes."""
        return self_adjusting_dice_loss(*self._both(logits, labels), **self._options()).sum(dim=1).mean()


class Focal(Criterion):
    r""":math:`-\tfrac1B \sum_b (1 - p_{y_b})^\gamma \log p_{y_b}`.

    Args:
        num_classes: number of classes C.
        gamma: γ ≥ 0; 0 is the cross-entropy.

    Raises:
        UserError: if ``gamma`` is negative.

    Source: Lin et al. 2017, arXiv 1708.02002, equation 4, in its softmax form.
    """

    def __init__(self, num_classes: int, gamma: float = 2.0) -> None:
        super().__init__(num_classes)
        if gamma < 0.0:
            raise UserError(f"Focal: gamma={gamma} must not be negative")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch."""
        return focal_loss(logits, labels, self.gamma).mean()


def class_counts(data: Any, num_classes: int) -> Tensor | None:
    """Labeled samples per class (C,) of a data module after ``setup("fit")``; ``None`` where it has no such role."""
    roles = getattr(data, "roles", None)
    if not isinstance(roles, dict) or "labeled" not in roles:
        return None
    labels = roles["labeled"].samples.labels
    return torch.bincount(labels[labels >= 0], minlength=num_classes)
