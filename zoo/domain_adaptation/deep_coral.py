"""Deep CORAL: Correlation Alignment for Deep Domain Adaptation.

Sun and Saenko, ECCV workshops 2016, https://arxiv.org/abs/1607.01719
"""

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.distributed import gather_with_gradient
from zoo.core.errors import UserError, check_choice
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.losses.coral import FORMS, coral


class DeepCORAL(DomainAdaptation):
    r"""Features of both domains have the same covariance.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s)) + \lambda \frac{1}{4 d^2} \lVert C_s - C_t \rVert_F^2

    The covariances :math:`C_s, C_t` are those of the batches of all ranks.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        alignment_weight: λ ≥ 0. The paper chooses it so that both terms are about equal at the end of the training.
        layer: what is aligned: ``"features"``, in front of the head, or ``"logits"``, the paper's fc8.
        form: ``"covariance"`` is the equation above, the paper's and pytorch-adapt's; ``"moments"`` that of TLlib and
            DomainBed, see :func:`~zoo.losses.coral.coral`.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`; the two networks of the paper share their
            weights, and each sees one domain.

    Raises:
        UserError: for an argument out of its range.

    Source: Sun and Saenko 2016, arXiv 1607.01719, equations 1-3 and 6.
    """

    card = Card(
        title="Deep CORAL: Correlation Alignment for Deep Domain Adaptation",
        year=2016,
        paper="arXiv:1607.01719",
        family="domain_adaptation",
        roles=("source", "target"),
    )
    published_forward_pass: ClassVar[Literal["joint", "split"]] = "split"

    def __init__(
        self,
        alignment_weight: float = 1.0,
        layer: Literal["features", "logits"] = "features",
        form: Literal["covariance", "moments"] = "covariance",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if alignment_weight < 0.0:
            raise UserError(f"DeepCORAL: alignment_weight={alignment_weight} must not be negative")
        check_choice("DeepCORAL", "layer", layer, ("features", "logits"))
        check_choice("DeepCORAL", "form", form, FORMS)
        self.alignment_weight, self.layer, self.form = alignment_weight, layer, form

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels; make the covariances alike."""
        source, target = batch["source"], batch["target"]
        aligned = source_features, target_features = self.both(source["image"], target["image"])
        logits = self.network.logits(source_features)
        if self.layer == "logits":
            aligned = logits, self.network.logits(target_features)
        distance = coral(gather_with_gradient(aligned[0]), gather_with_gradient(aligned[1]), self.form)
        return self.report(
            source=cross_entropy(logits, source["label"]),
            alignment=self.alignment_weight * distance,
        )
