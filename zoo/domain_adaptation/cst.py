"""Cycle Self-Training for Domain Adaptation.

Liu, Wang and Long, NeurIPS 2021, https://arxiv.org/abs/2103.03571
"""

from functools import reduce
from operator import add
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.distributed import gather_across_ranks, gather_with_gradient
from zoo.core.errors import UserError
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.losses.kernel_ridge import reverse_loss
from zoo.losses.tsallis import tsallis_confusion
from zoo.optim import SAM, with_parameters


class CST(DomainAdaptation):
    r"""Pseudo-labels of the target are good if a classifier that is fitted to them does well on the source.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s)) + \mu\, L_{rev} + \lambda\, S_\alpha(z^t)
        + \nu\, L_{FixMatch}, \qquad
        L_{rev} = \tfrac{1}{B_s K} \lVert K_{st} (K_{tt} + r I)^{-1} (\hat Y_t - \tfrac1K) - (Y_s - \tfrac1K) \rVert^2

    The reverse loss, see :func:`~zoo.losses.kernel_ridge.reverse_loss`, is the inner problem of the paper in closed
    form: kernel ridge regression with the cosine kernel of the features. S is the Tsallis entropy of the target, see
    :func:`~zoo.losses.tsallis.tsallis_confusion`. The gradient is that of sharpness-aware minimization, at
    :math:`\theta + \hat\epsilon`. Reverse loss and entropy are over the samples of all ranks.

    Batch: ``source`` {image, label}, ``target`` {weak, strong}.

    Args:
        reverse_weight: μ ≥ 0; 0.5 in the code, 2 in its commands for VisDA and Office-Home.
        entropy_weight: λ ≥ 0; 0.015 for Office-Home.
        self_training_weight: ν ≥ 0.
        threshold: of the weak view's confidence, in (0, 1].
        alpha: α > 0, the entropic index, fixed as in the code; the paper searches for it.
        temperature: of the entropy, > 0.
        ridge: r > 0.
        rho: radius ≥ 0 of SAM, adaptive as in the authors' code; 0 does without, at half the cost.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`; jointly, as in the code, are the source and
            the target's weak views, while the strong views always go through the network by themselves.

    The features are those in front of the head; the code takes those in front of the bottleneck. In its second pass
    BatchNorm moves again, here it does not.

    Raises:
        UserError: for an argument out of its range.

    Source: Liu et al. 2021, arXiv 2103.03571, sections 3-4; the authors' code.
    """

    card = Card(
        title="Cycle Self-Training for Domain Adaptation",
        year=2021,
        paper="arXiv:2103.03571",
        family="domain_adaptation",
        roles=("source", "target"),
    )
    target_views: ClassVar[tuple[str, ...]] = ("weak", "strong")

    def __init__(
        self,
        reverse_weight: float = 0.5,
        entropy_weight: float = 0.08,
        self_training_weight: float = 0.5,
        threshold: float = 0.97,
        alpha: float = 1.9,
        temperature: float = 2.0,
        ridge: float = 1e-3,
        rho: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        weights = {"reverse_weight": reverse_weight, "entropy_weight": entropy_weight, "rho": rho}
        for argument, value in {**weights, "self_training_weight": self_training_weight}.items():
            if value < 0.0:
                raise UserError(f"CST: {argument}={value} must not be negative")
        for argument, value in {"alpha": alpha, "temperature": temperature, "ridge": ridge}.items():
            if value <= 0.0:
                raise UserError(f"CST: {argument}={value} must be positive")
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"CST: threshold={threshold} must lie in (0, 1]")
        self.reverse_weight, self.entropy_weight = reverse_weight, entropy_weight
        self.self_training_weight, self.threshold = self_training_weight, threshold
        self.alpha, self.temperature, self.ridge = alpha, temperature, ridge
        self.sam = SAM(rho, adaptive=True, stability=0.0)

    def losses(self, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The terms at the network's weights of the moment."""
        source, target, network = batch["source"], batch["target"], self.network
        source_features, target_features = self.both(source["image"], target["weak"])
        source_logits, target_logits = network.logits(source_features), network.logits(target_features)
        confidence, pseudo_labels = target_logits.detach().float().softmax(dim=1).max(dim=1)
        confident = (confidence >= self.threshold).to(target_logits.dtype)
        strong = cross_entropy(network(target["strong"]), pseudo_labels, reduction="none")
        reverse = reverse_loss(
            gather_with_gradient(source_features),
            gather_across_ranks(source["label"]),
            gather_with_gradient(target_features),
            gather_across_ranks(pseudo_labels),
            self.num_classes,
            self.ridge,
        )
        uncertain = tsallis_confusion(gather_with_gradient(target_logits), self.alpha, self.temperature)
        return {
            "source": cross_entropy(source_logits, source["label"]),
            "reverse": self.reverse_weight * reverse,
            "entropy": self.entropy_weight * uncertain,
            "self_training": self.self_training_weight * (confident * strong).mean(),
        }

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """The loss at the worst weights nearby, as a function of the weights here."""
        terms = self.losses(batch)
        if self.sam.rho:
            above = self.sam.perturbed(reduce(add, terms.values()), dict(self.network.named_parameters()))
            with frozen_batch_norm(self.network):
                terms = with_parameters(self.network, above, self.losses, batch)
        return self.report(**terms)
