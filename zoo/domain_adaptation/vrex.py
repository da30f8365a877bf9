"""Out-of-Distribution Generalization via Risk Extrapolation (V-REx).

Krueger et al., ICML 2021, https://arxiv.org/abs/2003.00688
"""

from typing import Any

from torch import Tensor

from zoo.core.card import Card
from zoo.domain_adaptation.generalization import AnnealedPenalty, Batch
from zoo.losses.invariance import risk_variance


class VREx(AnnealedPenalty):
    r"""Risks that are equal in all domains, rather than low in some.

    .. math:: L = \tfrac1S \sum_s R_s + \beta_t\, \mathrm{Var}(R_1, \ldots, R_S)

    The variance has S in the denominator, as in the paper, DomainBed and TLlib. The paper adds up the risks; here they
    are averaged, so that its β is S times ours.

    Batch: ``source`` {image, label, domain}.

    Args:
        penalty_weight: β ≥ 0 from ``annealing_steps`` on; DomainBed's 10. TLlib's is 3 from the start.
        annealing_steps: optimizer steps before; DomainBed's 500 of 5,000.
        early_weight: β before.
        **kwargs: see :class:`~zoo.domain_adaptation.generalization.AnnealedPenalty`.

    Source: Krueger et al. 2021, arXiv 2003.00688, equation 8.
    """

    card = Card(
        title="Out-of-Distribution Generalization via Risk Extrapolation",
        year=2021,
        paper="arXiv:2003.00688",
        family="domain_adaptation",
        roles=("source",),
    )

    def __init__(
        self, penalty_weight: float = 10.0, annealing_steps: int = 500, early_weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(penalty_weight, annealing_steps, early_weight, **kwargs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit the labels equally well everywhere."""
        source = batch["source"]
        risks, counts = self.risks(self.network(source["image"]), source)
        return self.penalized(risks, counts, penalty=risk_variance(risks, counts))
