"""Self-ensembling for visual domain adaptation.

French, Mackiewicz and Fisher, ICLR 2018, https://arxiv.org/abs/1706.05208
"""

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.distributed import gather_with_gradient, mean_across_ranks
from zoo.core.errors import UserError, check_choice
from zoo.core.parts import InParts
from zoo.core.teachers import EMA
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.losses.class_balance import class_balance


class SelfEnsembling(InParts, DomainAdaptation):
    r"""On the target the student agrees with the average of its own weights, where that is confident.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p_\theta(x_i^s)) + \lambda \Big( \tfrac1{B_t} \sum_j m_j \tfrac1K
        \lVert p_\theta(\alpha_2(x_j^t)) - p_\phi(\alpha_1(x_j^t)) \rVert^2 + \beta\, \bar m\, R(\bar p) \Big), \qquad
        m_j = \mathbb 1[\max_k p_\phi(\alpha_1(x_j^t))_k > \tau]

    :math:`\alpha_1, \alpha_2` are two draws of the weak view, :math:`\phi \leftarrow m \phi + (1 - m) \theta` is the
    teacher, and R, see :func:`~zoo.losses.class_balance.class_balance`, keeps the student's mean prediction
    :math:`\bar p` from collapsing to a few classes; :math:`\bar m` is the share of confident samples. Mean prediction
    and share are those of all ranks. The teacher is evaluated.

    Batch: ``source`` {image, label}, ``target`` {weak, weak_2}.

    Args:
        momentum: m in [0, 1] of the teacher.
        consistency_weight: λ ≥ 0. TLlib sums over classes rather than averages: its 3 is 3 K here.
        threshold: τ in [0, 1); 0.968 in the paper for digits, 0.9 for VisDA and 0.8 in TLlib.
        balance_weight: β ≥ 0, 0.005 in the paper for digits and 0.01 for VisDA; 0 leaves the term out.
        teacher_mode: ``"train"``: the teacher predicts with dropout, and with the batch's own statistics in BatchNorm,
            as in the authors' code; ``"eval"``: as in an evaluation, whose statistics are the student's, of both
            domains.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`; in the paper each domain is normalised by
            itself.

    Raises:
        UserError: for an argument out of its range.

    Source: French et al. 2018, arXiv 1706.05208, section 3; the authors' code.
    """

    card = Card(
        title="Self-ensembling for visual domain adaptation",
        year=2018,
        paper="arXiv:1706.05208",
        family="domain_adaptation",
        roles=("source", "target"),
    )
    target_views: ClassVar[tuple[str, ...]] = ("weak", "weak_2")
    published_forward_pass: ClassVar[Literal["joint", "split"]] = "split"

    def __init__(
        self,
        momentum: float = 0.99,
        consistency_weight: float = 3.0,
        threshold: float = 0.968,
        balance_weight: float = 0.005,
        teacher_mode: Literal["eval", "train"] = "train",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= momentum <= 1.0:
            raise UserError(f"SelfEnsembling: momentum={momentum} must lie in [0, 1]")
        if not 0.0 <= threshold < 1.0:
            raise UserError(f"SelfEnsembling: threshold={threshold} must lie in [0, 1)")
        for argument, value in (("consistency_weight", consistency_weight), ("balance_weight", balance_weight)):
            if value < 0.0:
                raise UserError(f"SelfEnsembling: {argument}={value} must not be negative")
        check_choice("SelfEnsembling", "teacher_mode", teacher_mode, ("eval", "train"))
        self.momentum, self.threshold, self.teacher_mode = momentum, threshold, teacher_mode
        self.consistency_weight, self.balance_weight = consistency_weight, balance_weight

    def build(self) -> None:
        """The network and its average."""
        super().build()
        self.teacher = EMA(self.network, self.momentum)

    def student(self, batch: dict[str, dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """Logits of the source samples, and of the second view of the target's."""
        return self.both(batch["source"]["image"], batch["target"]["weak_2"], self.network)

    def targets(self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities for the first view, and which of them are confident."""
        self.teacher.module.train(self.teacher_mode == "train")
        probabilities = self.teacher(batch["target"]["weak"]).float().softmax(dim=1)
        self.teacher.module.eval()
        return probabilities, (probabilities.amax(dim=1) > self.threshold).to(probabilities.dtype)

    def losses(
        self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Fit the source labels, and the confident predictions of the teacher."""
        source, target = outputs
        predicted, (wanted, weights) = target.float().softmax(dim=1), targets
        distances = (predicted - wanted).square().mean(dim=1)
        terms = {
            "source": cross_entropy(source, batch["source"]["label"]),
            "consistency": self.consistency_weight * (weights * distances).mean(),
        }
        if self.balance_weight:
            weight = self.consistency_weight * self.balance_weight * mean_across_ranks(weights.mean())
            terms["balance"] = weight * class_balance(gather_with_gradient(predicted))
        return terms
