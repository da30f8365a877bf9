"""Conditional Adversarial Domain Adaptation (CDAN and CDAN+E).

Long et al., NeurIPS 2018, https://arxiv.org/abs/1705.10667
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from zoo.core.card import Card
from zoo.domain_adaptation.adversarial import Discriminating
from zoo.domain_adaptation.discriminators import MultilinearMap
from zoo.losses.adversarial import domain_loss, entropy_weights


class CDAN(Discriminating):
    r"""The domain cannot be told from features and prediction together.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, g_i^s) + w \, L_d\big( D(R_\lambda(T(f^s, \bar g^s))),
        D(R_\lambda(T(f^t, \bar g^t))) \big), \qquad T(f, g) = f \otimes g

    :math:`g` is the prediction; :math:`\bar g` has no gradient. CDAN+E weighs every sample in :math:`L_d` by
    :math:`1 + e^{-H(g)}`, so that what is predicted surely counts twice what is not.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        map: T, from the numbers of features and classes to a module of features and probabilities;
            :class:`~zoo.domain_adaptation.discriminators.FeaturesAlone` makes this DANN.
        entropy_weighting: CDAN+E. The weights have mean 1 over both domains and no gradient, as in TLlib; the authors'
            code reverses their gradient.
        **kwargs: see :class:`~zoo.domain_adaptation.adversarial.Discriminating`. Paper and TLlib pass the domains
            jointly.

    Source: Long et al. 2018, arXiv 1705.10667, section 3.
    """

    card = Card(
        title="Conditional Adversarial Domain Adaptation",
        year=2018,
        paper="arXiv:1705.10667",
        family="domain_adaptation",
        roles=("source", "target"),
    )

    def __init__(
        self,
        map: Callable[[int, int], nn.Module] = MultilinearMap,  # noqa: A002  (the paper's word)
        entropy_weighting: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.map_recipe, self.entropy_weighting = map, entropy_weighting

    def build_discriminator(self) -> None:
        """The map and the discriminator of its output."""
        self.map: Any = self.map_recipe(self.network.num_features, self.num_classes)
        size: Any = self.map.num_features
        self.discriminator = self.discriminator_recipe(size)

    def alignment(self, source: Tensor, target: Tensor, source_logits: Tensor) -> dict[str, Tensor]:
        """Confuse the discriminator of features and predictions."""
        logits_s, logits_t = source_logits.detach(), self.network.logits(target).detach()
        domains_s, domains_t = self.tell_apart(
            self.map(source, logits_s.float().softmax(dim=1).to(source.dtype)),
            self.map(target, logits_t.float().softmax(dim=1).to(target.dtype)),
        )
        weights = entropy_weights(logits_s, logits_t) if self.entropy_weighting else (None, None)
        return {"domain": self.domain_weight * domain_loss(domains_s, domains_t, *weights)}
