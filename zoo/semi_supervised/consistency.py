"""What the methods share that add one ramped term on unlabeled samples to the supervised loss."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.errors import UserError
from zoo.core.method import Method
from zoo.core.schedules import linear_ramp
from zoo.semi_supervised.base import SemiSupervised


class Consistency(SemiSupervised):
    r"""Base: :math:`L = L_x + r(t)\, \lambda\, L_u`.

    Args:
        unlabeled_weight: λ ≥ 0.
        ramp: share of training over which :math:`r` grows from 0 to 1, in [0, 1]; 0 is full weight at once.
        forward_pass: ``"split"`` normalises labeled and unlabeled samples apart, and only the labeled ones enter
            BatchNorm's running averages, as in the code of Oliver et al. 2018 (arXiv 1804.09170) and its successors;
            ``"joint"`` sends all through the network in one batch. The same for networks without BatchNorm.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Raises:
        UserError: if an argument is out of its range.
    """

    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak",)

    def __init__(
        self,
        unlabeled_weight: float = 1.0,
        ramp: float = 0.4,
        forward_pass: Literal["joint", "split"] = "split",
        **kwargs: Any,
    ) -> None:
        super().__init__(forward_pass=forward_pass, **kwargs)
        self.unlabeled_weight, self.ramp = unlabeled_weight, ramp
        name = type(self).__name__
        if unlabeled_weight < 0.0:
            raise UserError(f"{name}: unlabeled_weight={unlabeled_weight} must not be negative")
        if not 0.0 <= ramp <= 1.0:
            raise UserError(f"{name}: ramp={ramp} must lie in [0, 1], a share of the training")

    @property
    def ramped(self) -> float:
        r""":math:`r(t)` at this step: linear."""
        return linear_ramp(self.progress, self.ramp)

    def logits(self, labeled: Tensor, learning: Sequence[Tensor], watched: Sequence[Tensor] = ()) -> list[Tensor]:
        """Logits of the labeled samples, of the unlabeled views that learn, and of those that carry no gradient."""
        if self.forward_pass == "joint":
            return self.together([labeled, *learning], watched)
        logits = self.network(labeled)
        with frozen_batch_norm(self.network):
            return [logits, *self.together(learning, watched)]


def require_pixels(method: Method, *inputs: Any) -> None:
    """Refuse inputs that cannot be added to each other or moved a little.

    Raises:
        UserError: for token ids and everything else that is not a floating-point tensor.
    """
    for x in inputs:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise UserError(
                f"{type(method).__name__} computes with pixels; inputs of {kind}, such as token ids, have none. "
                "FixMatch, MeanTeacher and PseudoLabel take any input"
            )
