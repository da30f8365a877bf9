"""Larger Norm More Transferable: An Adaptive Feature Norm Approach for Unsupervised Domain Adaptation.

Xu et al., ICCV 2019, https://arxiv.org/abs/1811.07456
"""

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.distributed import gather_with_gradient
from zoo.core.errors import UserError, check_choice
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.losses.entropy import entropy
from zoo.losses.feature_norm import feature_norms, hard_feature_norm, stepwise_feature_norm


class AFN(DomainAdaptation):
    r"""Features of both domains grow: short ones are why a target is told apart badly.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s)) + \lambda (N_s + N_t) + \mu \tfrac1{B_t} \sum_j H(p(x_j^t))

    Stepwise (SAFN): :math:`N = \tfrac1B \sum_b (\lVert f_b \rVert - \mathrm{sg}[\lVert f_b \rVert + \Delta])^2`, every
    feature is to be longer by Δ than it is. Hard (HAFN): :math:`N = (\tfrac1B \sum_b \lVert f_b \rVert - R)^2`, over
    the samples of all ranks. The sum of the domains' means is that of the authors' code; the paper's is half of it.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        form: ``"stepwise"`` or ``"hard"``.
        norm_weight: λ ≥ 0.
        step: Δ ≥ 0 of the stepwise form; the authors take 0.3 for VisDA.
        radius: R ≥ 0 of the hard form.
        entropy_weight: μ ≥ 0 of the target's predictions; TLlib takes 0.1 for Office-31.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`; authors and TLlib pass the domains
            separately, through a ``Bottleneck`` of ``width: 1000``, ``dropout: 0.5`` and ``dropout_keeps: length``.

    Raises:
        UserError: for an argument out of its range.

    Source: Xu et al. 2019, arXiv 1811.07456, equations 4 and 7; the authors' code.
    """

    card = Card(
        title="Larger Norm More Transferable: An Adaptive Feature Norm Approach for Unsupervised Domain Adaptation",
        year=2019,
        paper="arXiv:1811.07456",
        family="domain_adaptation",
        roles=("source", "target"),
    )
    published_forward_pass: ClassVar[Literal["joint", "split"]] = "split"

    def __init__(
        self,
        form: Literal["stepwise", "hard"] = "stepwise",
        norm_weight: float = 0.05,
        step: float = 1.0,
        radius: float = 25.0,
        entropy_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("AFN", "form", form, ("stepwise", "hard"))
        numbers = {"norm_weight": norm_weight, "step": step, "radius": radius, "entropy_weight": entropy_weight}
        for argument, value in numbers.items():
            if value < 0.0:
                raise UserError(f"AFN: {argument}={value} must not be negative")
        self.form, self.norm_weight, self.step = form, norm_weight, step
        self.radius, self.entropy_weight = radius, entropy_weight

    def norm_loss(self, features: Tensor) -> Tensor:
        """N of one domain."""
        if self.form == "stepwise":
            return stepwise_feature_norm(features, self.step)
        return hard_feature_norm(gather_with_gradient(feature_norms(features)), self.radius)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels; let the features grow."""
        source, target = batch["source"], batch["target"]
        features = source_features, target_features = self.both(source["image"], target["image"])
        if self.logs_now:
            lengths = (feature_norms(part.detach()).mean() for part in features)
            self.observe(**dict(zip(("source_length", "target_length"), lengths, strict=True)))
        terms = {
            "source": cross_entropy(self.network.logits(source_features), source["label"]),
            "norm": self.norm_weight * (self.norm_loss(source_features) + self.norm_loss(target_features)),
        }
        if self.entropy_weight:
            terms["entropy"] = self.entropy_weight * entropy(self.network.logits(target_features)).mean()
        return self.report(**terms)
