"""Pseudo-Label: the simple and efficient semi-supervised learning method for deep neural networks.

Lee, ICML 2013 workshop on challenges in representation learning
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.policies import Policy, Threshold
from zoo.semi_supervised.consistency import Consistency


class PseudoLabel(Consistency):
    r"""The most probable class is taken for the label.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b))
        + r(t)\, \lambda\, \tfrac1{\mu B} \sum_b w(p(u_b))\, H(\hat y_b, p(u_b)),
        \quad \hat y_b = \arg\max_c p_c(u_b)

    Label and prediction come from the same logits of one weak view, so that the term can only make predictions surer
    than they are; no gradient flows through the label. The mean runs over all unlabeled samples.

    Lee labels every sample (a threshold below 1 / C) and grows the weight to 3; the threshold, the weight of 1 and the
    linear ramp are those of Oliver et al. 2018 (arXiv 1804.09170).

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy, which maps logits (μB, C) to targets and weights (μB,).
        **kwargs: ``unlabeled_weight`` λ, ``ramp`` and ``forward_pass`` of
            :class:`~zoo.semi_supervised.consistency.Consistency`, and those of its bases.

    Source: Lee 2013, equations 15 and 16.
    """

    card = Card(
        title="Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks",
        year=2013,
        paper="",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(self, policy: Callable[[int], Policy] = Threshold, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.policy_recipe = policy

    def build(self) -> None:
        """The networks and the policy."""
        super().build()
        self.policy = self.policy_recipe(self.num_classes)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels, and what is already believed."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        logits, own = self.logits(labeled["image"], [unlabeled["weak"]])
        targets, weights = self.policy(own.detach(), **self.evidence(batch, logits))
        self.watch(unlabeled, targets, weights)
        return self.report(
            supervised=self.criterion(logits, labeled["label"]),
            unlabeled=self.ramped
            * self.unlabeled_weight
            * (weights * cross_entropy(own, targets, reduction="none")).mean(),
        )
