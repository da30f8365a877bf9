"""FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling.

Zhang et al., NeurIPS 2021, https://arxiv.org/abs/2110.08263
"""

from collections.abc import Callable
from typing import Any

from zoo.core.card import Card
from zoo.policies import FlexibleThreshold, Policy
from zoo.semi_supervised.fixmatch import FixMatch


class FlexMatch(FixMatch):
    r"""FixMatch with a threshold for each class, lower where the class is learned less.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + \lambda \tfrac1{\mu B} \sum_b
        \mathbb 1[\max q_b \ge \tau\, M(\beta_t(\hat q_b))]\, H(\hat q_b, p(A(u_b)))

    :math:`\beta_t(c)`, the learning effect of class c, is the number of unlabeled samples that were last confidently
    predicted as c, relative to the best class, see :class:`~zoo.policies.flexible.FlexibleThreshold`. The state is one
    class for every unlabeled sample: batches need their ``index``.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, index, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy.
        **kwargs: see :class:`~zoo.semi_supervised.fixmatch.FixMatch`.

    Source: Zhang et al. 2021, arXiv 2110.08263, algorithm 1; the authors' code for the order of a step.
    """

    card = Card(
        title="FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling",
        year=2021,
        paper="arXiv:2110.08263",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(self, policy: Callable[[int], Policy] = FlexibleThreshold, **kwargs: Any) -> None:
        super().__init__(policy=policy, **kwargs)
