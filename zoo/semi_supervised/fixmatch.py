"""FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence.

Sohn et al., NeurIPS 2020, https://arxiv.org/abs/2001.07685
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.policies import Policy, Threshold
from zoo.semi_supervised.base import SemiSupervised


class FixMatch(SemiSupervised):
    r"""Confident predictions on weak views label the strong views.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + \lambda \tfrac1{\mu B} \sum_b w(q_b)\, H(\hat q_b, p(A(u_b))),
        \quad q_b = p(\alpha(u_b))

    :math:`\alpha` is the weak view, :math:`A` the strong one, :math:`w` and :math:`\hat q` come from the policy; no
    gradient flows through :math:`q`. The mean runs over all :math:`\mu B` unlabeled samples, also those of weight 0.
    The moving average of the weights is evaluated and does not label.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy, which maps weak logits (μB, C) to targets and weights (μB,).
        unlabeled_weight: :math:`\lambda` ≥ 0.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Source: Sohn et al. 2020, arXiv 2001.07685, equations 3 and 4.
    """

    card = Card(
        title="FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence",
        year=2020,
        paper="arXiv:2001.07685",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self, policy: Callable[[int], Policy] = Threshold, unlabeled_weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.policy_recipe, self.unlabeled_weight = policy, unlabeled_weight

    def build(self) -> None:
        """The networks and the policy."""
        super().build()
        self.policy = self.policy_recipe(self.num_classes)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels, and the strong views to the confident weak views."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        logits, weak, strong = self.views(labeled["image"], unlabeled["weak"], unlabeled["strong"])
        targets, weights = self.policy(weak, **self.evidence(batch, logits))
        self.watch(unlabeled, targets, weights)
        return self.report(
            supervised=self.criterion(logits, labeled["label"]),  # eq. 3
            unlabeled=self.unlabeled_weight
            * (weights * cross_entropy(strong, targets, reduction="none")).mean(),  # eq. 4
        )
