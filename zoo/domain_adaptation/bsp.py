"""Transferability vs. Discriminability: Batch Spectral Penalization for Adversarial Domain Adaptation (BSP).

Chen et al., ICML 2019, https://proceedings.mlr.press/v97/chen19i.html
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.domain_adaptation.cdan import CDAN
from zoo.domain_adaptation.discriminators import FeaturesAlone
from zoo.losses.spectral import spectral_penalty


class BSP(CDAN):
    r"""An adversarial method whose features may not lean on their first singular directions alone.

    .. math:: L = L_{\text{adversarial}} + \beta \sum_{i=1}^{k} \big( \sigma_i(F_s)^2 + \sigma_i(F_t)^2 \big)

    Those of large singular values transfer well, but the others discriminate: adversarial learning lets them fade.
    :math:`F_s, F_t` are the features of the batches, over all ranks, as rows.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        spectral_weight: :math:`\beta` ≥ 0. With 0 this is DANN or CDAN, bit for bit.
        directions: k ≥ 1.
        map: what the discriminator sees: ``FeaturesAlone`` for BSP on DANN, ``MultilinearMap`` for BSP on CDAN.
        **kwargs: see :class:`~zoo.domain_adaptation.cdan.CDAN`.

    Raises:
        UserError: for an argument out of its range.

    Source: Chen et al. 2019, PMLR 97; :math:`\beta` = 2e-4 and k = 1 as in TLlib.
    """

    card = Card(
        title="Transferability vs. Discriminability: Batch Spectral Penalization for Adversarial Domain Adaptation",
        year=2019,
        paper="https://proceedings.mlr.press/v97/chen19i.html",
        family="domain_adaptation",
        roles=("source", "target"),
    )

    def __init__(
        self,
        spectral_weight: float = 2e-4,
        directions: int = 1,
        map: Callable[[int, int], nn.Module] = FeaturesAlone,  # noqa: A002
        **kwargs: Any,
    ) -> None:
        super().__init__(map=map, **kwargs)
        if spectral_weight < 0:
            raise UserError(f"BSP: spectral_weight={spectral_weight} must not be negative")
        if directions < 1:
            raise UserError(f"BSP: directions={directions} must be at least 1")
        self.spectral_weight, self.directions = spectral_weight, directions

    def alignment(self, source: Tensor, target: Tensor, source_logits: Tensor) -> dict[str, Tensor]:
        """The adversary's term and the penalty."""
        penalty = spectral_penalty(source, self.directions) + spectral_penalty(target, self.directions)
        return {**super().alignment(source, target, source_logits), "spectral": self.spectral_weight * penalty}
