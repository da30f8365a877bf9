"""Bridging Theory and Algorithm for Domain Adaptation: margin disparity discrepancy (MDD).

Zhang et al., ICML 2019, https://arxiv.org/abs/1904.05801
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.gradient_reversal import reverse_gradient
from zoo.core.heads import MLP, Head
from zoo.domain_adaptation.adversarial import Adversarial
from zoo.losses.margin_disparity import margin_disparity_loss


class MDD(Adversarial):
    r"""A second head agrees with the first on the source and disagrees on the target; the features stop it.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, h(f_i^s)) + w \Big( \tfrac{\gamma}{B_s} \sum_i
        H(\hat y_i^s, h'(R_\lambda f_i^s)) - \tfrac1{B_t} \sum_j \log\big(1 - p_{h'}(\hat y_j^t \mid R_\lambda f_j^t)
        \big) \Big)

    :math:`\hat y` is the first head's prediction, which has no gradient: that head learns from the source labels alone.
    The second head follows its loss downhill, the features follow it uphill by :math:`\lambda`.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        adversary: h', from the numbers of features and classes to a head.
        margin: :math:`\gamma` > 0.
        max_reversal: the value that λ approaches.
        **kwargs: see :class:`~zoo.domain_adaptation.adversarial.Adversarial`. Paper and TLlib pass the domains jointly,
            with two layers and dropout in both heads.

    Raises:
        UserError: for an argument out of its range.

    Source: Zhang et al. 2019, arXiv 1904.05801; :math:`\gamma` = 4 and λ up to 0.1 as in TLlib.
    """

    card = Card(
        title="Bridging Theory and Algorithm for Domain Adaptation",
        year=2019,
        paper="arXiv:1904.05801",
        family="domain_adaptation",
        roles=("source", "target"),
    )

    def __init__(
        self,
        adversary: Callable[[int, int], Head] = MLP,
        margin: float = 4.0,
        max_reversal: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_reversal=max_reversal, **kwargs)
        if margin <= 0:
            raise UserError(f"MDD: margin={margin} must be greater than 0")
        if self.num_classes < 2:
            raise UserError("MDD: num_classes=1 leaves the second head nothing to disagree about")
        self.adversary_recipe, self.margin = adversary, margin

    def build(self) -> None:
        """The network and the second head."""
        super().build()
        with torch.random.fork_rng(devices=[]):
            self.adversary = self.adversary_recipe(self.network.num_features, self.num_classes)

    def alignment(self, source: Tensor, target: Tensor, source_logits: Tensor) -> dict[str, Tensor]:
        """The second head's loss, behind the reversal."""
        against = self.adversary(reverse_gradient(torch.cat([source, target]), self.reversal))
        if self.logs_now:
            self.observe(reversal=torch.tensor(self.reversal))
        loss = margin_disparity_loss(
            source_logits, against[: len(source)], self.network.logits(target), against[len(source) :], self.margin
        )
        return {"disparity": self.domain_weight * loss}
