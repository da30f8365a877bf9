"""FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning.

Wang et al., ICLR 2023, https://arxiv.org/abs/2205.07246
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.losses import fairness_loss
from zoo.policies import SelfAdaptiveThreshold
from zoo.semi_supervised.fixmatch import FixMatch


class FreeMatch(FixMatch):
    r"""FixMatch with thresholds that follow the confidence, and a pull towards predicting every class.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + \lambda \tfrac1{\mu B} \sum_b
        \mathbb 1[\max q_b \ge \tau_t(\hat q_b)]\, H(\hat q_b, p(A(u_b))) + \lambda_f L_f

    :math:`\tau_t(c)` is of :class:`~zoo.policies.adaptive.SelfAdaptiveThreshold`, whose averages move before they are
    used; :math:`L_f` is :func:`~zoo.losses.fairness.fairness_loss` on the strong views that are kept.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a :class:`~zoo.policies.adaptive.SelfAdaptiveThreshold`.
        fairness_weight: :math:`\lambda_f` ≥ 0; the paper takes 0.001 to 0.05.
        **kwargs: see :class:`~zoo.semi_supervised.fixmatch.FixMatch`.

    Raises:
        UserError: if ``fairness_weight`` is negative, or the policy is of another kind.

    Source: Wang et al. 2023, arXiv 2205.07246, equation 12.
    """

    card = Card(
        title="FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning",
        year=2023,
        paper="arXiv:2205.07246",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    policy: SelfAdaptiveThreshold

    def __init__(
        self,
        policy: Callable[[int], SelfAdaptiveThreshold] = SelfAdaptiveThreshold,
        fairness_weight: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy=policy, **kwargs)
        if fairness_weight < 0.0:
            raise UserError(f"FreeMatch: fairness_weight={fairness_weight} must not be negative")
        self.fairness_weight = fairness_weight

    def build(self) -> None:
        """The networks and the policy."""
        super().build()
        if not isinstance(self.policy, SelfAdaptiveThreshold):
            raise UserError(f"FreeMatch: policy={type(self.policy).__name__} must be a SelfAdaptiveThreshold")

    def losses(
        self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Fit the labels, and the strong views to the confident weak views, fairly."""
        fairness = fairness_loss(outputs[1], targets[1], self.policy.mean, self.policy.histogram)
        return super().losses(batch, outputs, targets) | {"fairness": self.fairness_weight * fairness}
