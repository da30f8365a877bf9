"""Learning Transferable Features with Deep Adaptation Networks.

Long et al., ICML 2015, https://arxiv.org/abs/1502.02791
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.distributed import gather_with_gradient
from zoo.core.errors import UserError, check_choice
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.losses.mmd import ESTIMATORS, MULTIPLIERS, Estimator, mmd


class DAN(DomainAdaptation):
    r"""Features of both domains have the same mean in the feature space of several Gaussian kernels.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s)) + \lambda \, d_k^2(f^s, f^t), \qquad
        k(a, b) = \sum_u \exp\!\Big( -\frac{\lVert a - b \rVert^2}{2 a_u \sigma^2} \Big)

    d is the maximum mean discrepancy, see :func:`~zoo.losses.mmd.mmd`, of the features that the head sees; the paper
    sums it over the last layers of AlexNet, and finds weights of the kernels, which are 1 here as in TLlib. The samples
    of all ranks count together.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        discrepancy_weight: λ ≥ 0; 1 in TLlib.
        estimator: ``"linear"``, whose memory is linear in the batch, is TLlib's default; ``"pairs"`` is the paper's;
            ``"unbiased"`` and ``"biased"`` use all pairs. TLlib's losses are larger by the constant 2 / (B - 1).
        multipliers: :math:`a_u` > 0.
        variance: :math:`\sigma^2` > 0; ``None`` is the mean squared distance of the samples at hand.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`; TLlib passes the domains separately.

    Raises:
        UserError: for an argument out of its range.

    Source: Long et al. 2015, arXiv 1502.02791, equations 1-4 and 7.
    """

    card = Card(
        title="Learning Transferable Features with Deep Adaptation Networks",
        year=2015,
        paper="arXiv:1502.02791",
        family="domain_adaptation",
        roles=("source", "target"),
    )
    published_forward_pass: ClassVar[Literal["joint", "split"]] = "split"

    def __init__(
        self,
        discrepancy_weight: float = 1.0,
        estimator: Estimator = "linear",
        multipliers: Sequence[float] = MULTIPLIERS,
        variance: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        if discrepancy_weight < 0.0:
            raise UserError(f"{name}: discrepancy_weight={discrepancy_weight} must not be negative")
        check_choice(name, "estimator", estimator, ESTIMATORS)
        if not multipliers or min(multipliers) <= 0.0:
            raise UserError(f"{name}: multipliers={multipliers} must be positive, and at least one")
        if variance is not None and variance <= 0.0:
            raise UserError(f"{name}: variance={variance} must be positive, or null for the samples' own")
        self.discrepancy_weight, self.estimator = discrepancy_weight, estimator
        self.multipliers, self.variance = tuple(multipliers), variance

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels; bring the features together."""
        source, target = batch["source"], batch["target"]
        source_features, target_features = self.both(source["image"], target["image"])
        features = gather_with_gradient(source_features), gather_with_gradient(target_features)
        discrepancy = mmd(*features, self.multipliers, self.variance, self.estimator)
        return self.report(
            source=cross_entropy(self.network.logits(source_features), source["label"]),
            discrepancy=self.discrepancy_weight * discrepancy,
        )
