"""Distributionally Robust Neural Networks for Group Shifts (group DRO).

Sagawa et al., ICLR 2020, https://arxiv.org/abs/1911.08731
"""

from typing import Any

import torch
from torch import Tensor

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.domain_adaptation.generalization import Batch, DomainGeneralization
from zoo.losses.invariance import robust_weights


class GroupDRO(DomainGeneralization):
    r"""The worst domain counts most.

    .. math:: L = \sum_s q_s R_s, \qquad q_s \leftarrow q_s e^{\eta R_s} \Big/ \sum_t q_t e^{\eta R_t}

    The weights q move first and then weigh the step; they are the same on all ranks, as the risks are those of all
    samples. They begin at 1 / S. (DomainBed begins at 1, which is the same, since its first step normalises them.)

    Batch: ``source`` {image, label, domain}.

    Args:
        rate: η ≥ 0; 0 is :class:`~zoo.domain_adaptation.erm.ERM`.
        **kwargs: see :class:`~zoo.domain_adaptation.generalization.DomainGeneralization`.

    Raises:
        UserError: for a negative ``rate``.

    Source: Sagawa et al. 2020, arXiv 1911.08731, algorithm 1, where a step sees one group; here as in DomainBed all.
    """

    card = Card(
        title="Distributionally Robust Neural Networks for Group Shifts",
        year=2020,
        paper="arXiv:1911.08731",
        family="domain_adaptation",
        roles=("source",),
    )
    weights: Tensor

    def __init__(self, rate: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not rate >= 0.0:
            raise UserError(f"GroupDRO: rate={rate} must not be negative")
        self.rate = rate

    def build(self) -> None:
        """The network and the weights of the domains."""
        super().build()
        self.register_buffer("weights", torch.full((self.num_domains,), 1 / self.num_domains))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weigh the domains by their risks, and fit the labels."""
        source = batch["source"]
        risks, _ = self.risks(self.network(source["image"]), source)
        if self.training:
            self.weights = robust_weights(self.weights, risks, self.rate)
        self.observe(largest_weight=self.weights.max())
        return self.report(source=(self.weights * risks).sum())
