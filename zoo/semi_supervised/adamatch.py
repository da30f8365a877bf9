"""AdaMatch: A Unified Approach to Semi-Supervised Learning and Domain Adaptation.

Berthelot et al., ICLR 2022, https://arxiv.org/abs/2106.04732
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.schedules import cosine_decay, linear_ramp
from zoo.policies import Policy, RelativeThreshold
from zoo.semi_supervised.fixmatch import FixMatch


class AdaMatch(FixMatch):
    r"""FixMatch whose predictions are aligned with, and whose threshold is relative to, those on labeled samples.

    .. math:: L = \tfrac1{2B} \sum_b \left[H(y_b, p(\alpha(x_b))) + H(y_b, p(A(x_b)))\right] + \mu(t) \lambda
        \tfrac1{\mu B} \sum_b \mathbb 1[\max \tilde q_b \ge c_\tau]\, H(\arg\max \tilde q_b, p(A(u_b))), \quad
        \mu(t) = \tfrac12 - \tfrac12 \cos(\min(\pi, \pi t / r))

    :math:`\tilde q` and :math:`c_\tau` are of :class:`~zoo.policies.relative.RelativeThreshold`. The labeled logits
    :math:`z` are interpolated at random, :math:`z \leftarrow z' + u\,(z'' - z')` with :math:`u \sim U(0, 1)` for every
    logit, between :math:`z'` of the joint batch and :math:`z''` of the labeled batch by itself, which differ by the
    statistics of BatchNorm; those of the labeled batch are not remembered. Without BatchNorm or dropout it has no
    effect.

    Batch: ``labeled`` {image, strong, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy.
        ramp: r, the share of training over which the unlabeled weight rises; 0 = constant, as in USB.
        interpolation: random logit interpolation, as in the paper; USB has none.
        **kwargs: see :class:`~zoo.semi_supervised.fixmatch.FixMatch`.

    Raises:
        UserError: if ``ramp`` is outside [0, 1].

    Source: Berthelot et al. 2022, arXiv 2106.04732, section 3; the released code of the semi-supervised runs.
    """

    card = Card(
        title="AdaMatch: A Unified Approach to Semi-Supervised Learning and Domain Adaptation",
        year=2022,
        paper="arXiv:2106.04732",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    labeled_views: ClassVar[tuple[str, ...]] = ("image", "strong")

    def __init__(
        self,
        policy: Callable[[int], Policy] = RelativeThreshold,
        ramp: float = 0.5,
        interpolation: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy=policy, **kwargs)
        if not 0.0 <= ramp <= 1.0:
            raise UserError(f"AdaMatch: ramp={ramp} must lie in [0, 1]")
        self.ramp, self.interpolation = ramp, interpolation

    def student(self, batch: dict[str, dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """As for FixMatch, with the labeled logits of both views, one after the other."""
        known = torch.cat([batch["labeled"]["image"], batch["labeled"]["strong"]])
        weak = [batch["unlabeled"]["weak"]] if self.labeler == "student" else []
        logits, *unlabeled = self.together([known, batch["unlabeled"]["strong"]], weak)
        return (self.interpolated(known, logits) if self.interpolation else logits, *unlabeled)

    def targets(self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Aligned with, and relative to, the predictions on the weak views of the labeled samples."""
        return super().targets(batch, (outputs[0].chunk(2)[0], *outputs[1:]))

    def losses(
        self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Fit the labels in both views, and the strong views to the relatively confident weak views."""
        weak, strong = outputs[0].chunk(2)
        terms = super().losses(batch, (weak, *outputs[1:]), targets)
        terms["supervised"] = 0.5 * (terms["supervised"] + self.criterion(strong, batch["labeled"]["label"]))
        terms["unlabeled"] = terms["unlabeled"] * (1.0 - cosine_decay(linear_ramp(self.progress, self.ramp)))
        return terms

    def interpolated(self, inputs: Tensor, logits: Tensor) -> Tensor:
        """Logits between those of the joint batch and those of these inputs by themselves."""
        with frozen_batch_norm(self.network):
            alone = self.network(inputs)
        share = torch.rand(logits.shape).to(logits, non_blocking=True)
        return logits + share * (alone - logits)
