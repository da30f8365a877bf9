"""FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence.

Sohn et al., NeurIPS 2020, https://arxiv.org/abs/2001.07685
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError, suggest
from zoo.policies import Policy, Threshold
from zoo.semi_supervised.base import TeacherStudent


class FixMatch(TeacherStudent):
    r"""Confident predictions on weak views label the strong views.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + \lambda \tfrac1{\mu B} \sum_b w(q_b)\, H(\hat q_b, p(A(u_b))),
        \quad q_b = p(\alpha(u_b))

    :math:`\alpha` is the weak view, :math:`A` the strong one, :math:`w` and :math:`\hat q` come from the policy; no
    gradient flows through :math:`q`. The mean runs over all :math:`\mu B` unlabeled samples, also those of weight 0.
    The moving average of the weights is evaluated and, in the paper, does not label.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy, which maps weak logits (μB, C) to targets and weights (μB,).
        unlabeled_weight: :math:`\lambda` ≥ 0.
        labeler: whose predictions :math:`q` label: ``"student"`` as in the paper, or ``"teacher"``, the moving average.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Raises:
        UserError: for a negative ``unlabeled_weight``; for another ``labeler``, or for ``"teacher"`` in a subclass with
            a step of its own.

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
        self,
        policy: Callable[[int], Policy] = Threshold,
        unlabeled_weight: float = 1.0,
        labeler: Literal["student", "teacher"] = "student",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        if unlabeled_weight < 0.0:
            raise UserError(f"{name}: unlabeled_weight={unlabeled_weight} must not be negative")
        if labeler not in ("student", "teacher"):
            raise UserError(
                f"{name}: labeler={labeler!r} must be 'student' or 'teacher'.{suggest(labeler, ['student', 'teacher'])}"
            )
        if labeler != "student" and type(self).training_step is not TeacherStudent.training_step:
            raise UserError(f"{name}: labeler={labeler!r} is for FixMatch's own step, and {name} has another")
        self.policy_recipe, self.unlabeled_weight, self.labeler = policy, unlabeled_weight, labeler

    def build(self) -> None:
        """The networks and the policy."""
        super().build()
        self.policy = self.policy_recipe(self.num_classes)

    def student(self, batch: dict[str, dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """Logits of the labeled samples and the strong views, and of the weak views where the student labels."""
        weak = [batch["unlabeled"]["weak"]] if self.labeler == "student" else []
        return tuple(self.together([batch["labeled"]["image"], batch["unlabeled"]["strong"]], weak))

    def targets(self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Pseudo-labels of the weak views, and which of them to trust."""
        weak = outputs[2] if self.labeler == "student" else self.teacher(batch["unlabeled"]["weak"])
        return self.policy(weak, **self.evidence(batch, outputs[0]))

    def losses(
        self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Fit the labels, and the strong views to the confident weak views."""
        logits, strong = outputs[:2]
        pseudo_labels, weights = targets
        unlabeled = (weights * cross_entropy(strong, pseudo_labels, reduction="none")).mean()
        return {
            "supervised": self.criterion(logits, batch["labeled"]["label"]),  # eq. 3
            "unlabeled": self.unlabeled_weight * unlabeled,  # eq. 4
        }
