"""Debiased Learning from Naturally Imbalanced Pseudo-Labels.

Wang et al., CVPR 2022, https://arxiv.org/abs/2201.01490
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.policies import DebiasedThreshold
from zoo.semi_supervised.fixmatch import FixMatch


class DebiasMatch(FixMatch):
    r"""FixMatch whose pseudo-labels are freed of the network's preference, and whose loss asks for a margin against it.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + \lambda \tfrac1{\mu B} \sum_b w_b\,
        H\!\left(\hat q_b, \mathrm{softmax}(z(A(u_b)) + \lambda_d \log \hat q)\right), \quad
        q_b = \mathrm{softmax}(z(\alpha(u_b)) - \lambda_d \log \hat q)

    :math:`\hat q`, the running mean of the weak views' predictions, is of
    :class:`~zoo.policies.debiased.DebiasedThreshold`: it labels, then moves, then makes the margin.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a :class:`~zoo.policies.debiased.DebiasedThreshold`.
        **kwargs: see :class:`~zoo.semi_supervised.fixmatch.FixMatch`.

    Raises:
        UserError: if the policy is of another kind.

    Source: Wang et al. 2022, arXiv 2201.01490: adaptive debiasing and adaptive marginal loss, without CLD.
    """

    card = Card(
        title="Debiased Learning from Naturally Imbalanced Pseudo-Labels",
        year=2022,
        paper="arXiv:2201.01490",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    policy: DebiasedThreshold

    def __init__(self, policy: Callable[[int], DebiasedThreshold] = DebiasedThreshold, **kwargs: Any) -> None:
        super().__init__(policy=policy, **kwargs)

    def build(self) -> None:
        """The networks and the policy."""
        super().build()
        if not isinstance(self.policy, DebiasedThreshold):
            raise UserError(f"DebiasMatch: policy={type(self.policy).__name__} must be a DebiasedThreshold")

    def losses(
        self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Fit the labels, and the strong views to the debiased weak views by a margin."""
        logits, strong, *weak = outputs
        return super().losses(batch, (logits, strong.float() + self.policy.margin, *weak), targets)
