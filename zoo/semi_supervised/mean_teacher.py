"""Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep learning.

Tarvainen and Valpola, NeurIPS 2017, https://arxiv.org/abs/1703.01780
"""

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import mse_loss

from zoo.core.card import Card
from zoo.core.errors import UserError, suggest
from zoo.core.schedules import sigmoid_ramp
from zoo.semi_supervised.base import TeacherStudent


class MeanTeacher(TeacherStudent):
    r"""The student agrees with the average of its own weights on another view of the sample.

    .. math:: L = \tfrac1B \sum_b H(y_b, p_\theta(x_b)) + \lambda\, r(t)\, \tfrac1{\mu B C} \sum_b
        \lVert p_\theta(\alpha_2(u_b)) - p_\phi(\alpha_1(u_b)) \rVert^2, \quad \phi \leftarrow m \phi + (1 - m) \theta

    :math:`\alpha_1, \alpha_2` are two draws of the weak view, :math:`r(t)` is a sigmoid ramp; no gradient flows through
    the teacher :math:`\phi`. The mean runs over samples and classes, as in the authors' code.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, weak_2, hidden_label (watched only)}.

    Args:
        unlabeled_weight: :math:`\lambda` ≥ 0.
        ramp: share of the training in [0, 1] over which :math:`r` grows from :math:`e^{-5}` to 1; 0 for none.
        warmup: let the average forget the random start by a smaller :math:`m` early on, see
            :class:`~zoo.core.teachers.EMA`.
        teacher_mode: ``"train"``: the teacher predicts with dropout, and with the batch's own statistics in BatchNorm,
            as in the authors' code; ``"eval"``: as in an evaluation. Its running statistics are then the student's:
            while that moves fast they fit the average's weights badly, and the two can mislead each other.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Raises:
        UserError: for an argument out of its range.

    Source: Tarvainen and Valpola 2017, arXiv 1703.01780, section 2; :math:`\lambda` = 50 as in TorchSSL, where the
    paper's 100 goes with a loss that also covers labeled samples.
    """

    card = Card(
        title="Mean teachers are better role models",
        year=2017,
        paper="arXiv:1703.01780",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "weak_2")

    def __init__(
        self,
        unlabeled_weight: float = 50.0,
        ramp: float = 0.4,
        warmup: bool = True,
        teacher_mode: Literal["eval", "train"] = "train",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if unlabeled_weight < 0.0:
            raise UserError(f"MeanTeacher: unlabeled_weight={unlabeled_weight} must not be negative")
        if not 0.0 <= ramp <= 1.0:
            raise UserError(f"MeanTeacher: ramp={ramp} must lie in [0, 1], a share of the training")
        if teacher_mode not in ("eval", "train"):
            near = suggest(teacher_mode, ["eval", "train"])
            raise UserError(f"MeanTeacher: teacher_mode={teacher_mode!r} must be 'eval' or 'train'.{near}")
        self.unlabeled_weight, self.ramp, self.warmup, self.teacher_mode = unlabeled_weight, ramp, warmup, teacher_mode

    def build(self) -> None:
        """The network and its average."""
        super().build()
        self.teacher.warmup = self.warmup

    def student(self, batch: dict[str, dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """Logits of the labeled samples, and of the second view of the unlabeled ones."""
        return tuple(self.together([batch["labeled"]["image"], batch["unlabeled"]["weak_2"]]))

    def targets(self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities for the first view, all of which count."""
        self.teacher.module.train(self.teacher_mode == "train")
        probabilities = self.teacher(batch["unlabeled"]["weak"]).softmax(dim=1)
        self.teacher.module.eval()
        return probabilities, probabilities.new_ones(len(probabilities))

    def losses(
        self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Fit the labels and the teacher. Autocast computes probabilities and their difference in 32 bits."""
        logits, second = outputs
        weight = self.unlabeled_weight * sigmoid_ramp(self.progress, self.ramp)
        return {
            "supervised": self.criterion(logits, batch["labeled"]["label"]),
            "consistency": weight * mse_loss(second.softmax(dim=1), targets[0]),
        }
