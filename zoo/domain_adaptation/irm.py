"""Invariant Risk Minimization.

Arjovsky et al., 2019, https://arxiv.org/abs/1907.02893
"""

from typing import Any, Literal

from torch import Tensor

from zoo.core.card import Card
from zoo.core.errors import check_choice
from zoo.domain_adaptation.generalization import AnnealedPenalty, Batch
from zoo.losses.domain_means import mean_over_domains
from zoo.losses.invariance import irm_penalty


class IRM(AnnealedPenalty):
    r"""One classifier that is the best in every domain at once (IRMv1).

    .. math:: L = \tfrac1S \sum_s R_s + w_t \tfrac1S \sum_s \big\lVert \nabla_{w | w = 1} R_s(w \cdot z) \big\rVert^2

    The gradient with respect to the dummy factor w is in closed form, :math:`\langle p - e_y, z \rangle`, so that no
    second derivative is taken.

    Batch: ``source`` {image, label, domain}.

    Args:
        penalty_weight: λ ≥ 0 from ``annealing_steps`` on; DomainBed's 100. The paper's ColoredMNIST has 91,257 and
            ``rescale: true``.
        annealing_steps: optimizer steps before; DomainBed's 500 of 5,000, 190 of 501 for the paper's ColoredMNIST.
        early_weight: λ before, 1 in both.
        estimator: ``"unbiased"`` multiplies the gradients of two halves of every domain's samples, as DomainBed and
            the paper's appendix D: the penalty may be negative. ``"squared"`` squares that of all, as the authors' code
            for ColoredMNIST, which takes the whole training set in every step.
        **kwargs: see :class:`~zoo.domain_adaptation.generalization.AnnealedPenalty`.

    Raises:
        UserError: for another ``estimator``.

    Source: Arjovsky et al. 2019, arXiv 1907.02893, equation (IRMv1) and appendix D.
    """

    card = Card(
        title="Invariant Risk Minimization",
        year=2019,
        paper="arXiv:1907.02893",
        family="domain_adaptation",
        roles=("source",),
    )

    def __init__(
        self,
        penalty_weight: float = 100.0,
        annealing_steps: int = 500,
        early_weight: float = 1.0,
        estimator: Literal["unbiased", "squared"] = "unbiased",
        **kwargs: Any,
    ) -> None:
        super().__init__(penalty_weight, annealing_steps, early_weight, **kwargs)
        check_choice("IRM", "estimator", estimator, ("unbiased", "squared"))
        self.estimator: Literal["unbiased", "squared"] = estimator

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit the labels with a classifier that no domain would scale."""
        source = batch["source"]
        logits = self.network(source["image"])
        penalties = irm_penalty(logits, source["label"], source["domain"], self.num_domains, self.estimator)
        return self.penalized(*self.risks(logits, source), penalty=mean_over_domains(*penalties))
