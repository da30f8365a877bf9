"""Deep Transfer Learning with Joint Adaptation Networks.

Long et al., ICML 2017, https://arxiv.org/abs/1605.06636
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.distributed import gather_with_gradient
from zoo.core.errors import UserError, check_choice
from zoo.core.gradient_reversal import reverse_gradient
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.losses.mmd import ESTIMATORS, Estimator, Gaussian, joint_mmd


class JAN(DomainAdaptation):
    r"""Features and predictions together have the same distribution in both domains.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s)) + \lambda \, d_k^2\big( (f^s, p^s), (f^t, p^t) \big), \qquad
        k = k_f(f, f')\, k_p(p, p')

    :math:`k_f` is DAN's sum of five Gaussian kernels, :math:`k_p` one of a fixed width; d is the maximum mean
    discrepancy under their product, see :func:`~zoo.losses.mmd.joint_mmd`. The samples of all ranks count together.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        discrepancy_weight: λ ≥ 0; 1 in TLlib.
        estimator: ``"unbiased"`` as TLlib's default, whose loss is larger by the constant 2 / (B - 1); the paper's is
            ``"pairs"``, see :func:`~zoo.losses.mmd.mmd`.
        sigma: width > 0 of the kernel of the predictions, :math:`\sigma^2` being its variance.
        adversarial: the paper's JAN-A: a linear map in front of each kernel, the identity at first, learns to make the
            discrepancy larger.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`; TLlib passes the domains jointly.

    Raises:
        UserError: for an argument out of its range.

    Source: Long et al. 2017, arXiv 1605.06636, equations 6-9, and 10 for the adversarial form.
    """

    card = Card(
        title="Deep Transfer Learning with Joint Adaptation Networks",
        year=2017,
        paper="arXiv:1605.06636",
        family="domain_adaptation",
        roles=("source", "target"),
    )

    def __init__(
        self,
        discrepancy_weight: float = 1.0,
        estimator: Estimator = "unbiased",
        sigma: float = 0.92,
        adversarial: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if discrepancy_weight < 0.0:
            raise UserError(f"JAN: discrepancy_weight={discrepancy_weight} must not be negative")
        check_choice("JAN", "estimator", estimator, ESTIMATORS)
        if sigma <= 0.0:
            raise UserError(f"JAN: sigma={sigma} must be positive")
        self.discrepancy_weight, self.estimator, self.adversarial = discrepancy_weight, estimator, adversarial
        self.kernels = Gaussian(), Gaussian((1.0,), sigma**2)

    def build(self) -> None:
        """The network, and the maps that the adversarial form learns."""
        super().build()
        sizes = (self.network.num_features, self.num_classes) if self.adversarial else ()
        with torch.random.fork_rng(devices=[]):
            maps = [nn.Linear(size, size) for size in sizes]
        for linear in maps:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.maps = nn.ModuleList(maps)

    def mapped(self, layers: list[Tensor]) -> list[Tensor]:
        """Layers of all ranks as the kernels see them: reversed behind a map it climbs, before it the features not."""
        if self.adversarial:
            maps = zip(self.maps, layers, strict=True)
            layers = [reverse_gradient(linear(reverse_gradient(layer))) for linear, layer in maps]
        return [gather_with_gradient(layer) for layer in layers]

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels; bring features and predictions together."""
        source, target = batch["source"], batch["target"]
        source_features, target_features = self.both(source["image"], target["image"])
        source_logits, target_logits = self.network.logits(source_features), self.network.logits(target_features)
        discrepancy = joint_mmd(
            self.mapped([source_features, source_logits.softmax(dim=1)]),
            self.mapped([target_features, target_logits.softmax(dim=1)]),
            self.kernels,
            self.estimator,
        )
        return self.report(
            source=cross_entropy(source_logits, source["label"]),
            discrepancy=self.discrepancy_weight * discrepancy,
        )
