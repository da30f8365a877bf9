"""Features whose moments, or whose kernel means, are the same in all source domains.

Sun and Saenko, ECCV Workshops 2016, https://arxiv.org/abs/1607.01719; Li et al., CVPR 2018; for domain generalization
as in Gulrajani and Lopez-Paz, ICLR 2021, https://arxiv.org/abs/2007.01434
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.domain_adaptation.generalization import Batch, DomainGeneralization
from zoo.losses.domain_means import mean_over_domains, pairwise_coral, pairwise_mmd


class DomainMatching(DomainGeneralization):
    r"""Base: the mean risk, and how far the features of two domains are apart on average.

    .. math:: L = \tfrac1S \sum_s R_s + \gamma \frac{2}{S (S - 1)} \sum_{i < j} d(F_i, F_j)

    Args:
        penalty_weight: γ ≥ 0, 1 in DomainBed.
        **kwargs: see :class:`~zoo.domain_adaptation.generalization.DomainGeneralization`.

    Raises:
        UserError: for a negative ``penalty_weight``.
    """

    def __init__(self, penalty_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not penalty_weight >= 0.0:
            raise UserError(f"{type(self).__name__}: penalty_weight={penalty_weight} must not be negative")
        self.penalty_weight = penalty_weight

    def discrepancy(self, features: Tensor, domain: Tensor) -> Tensor:
        """Mean of d over all pairs of domains, from features (B, D) and domains (B,)."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit the labels, and bring the domains together."""
        source = batch["source"]
        features = self.network.features(source["image"])
        risks, counts = self.risks(self.network.logits(features), source)
        return self.report(
            source=mean_over_domains(risks, counts),
            discrepancy=self.penalty_weight * self.discrepancy(features, source["domain"]),
        )


class CORALGeneralization(DomainMatching):
    r"""Features with the same mean and covariance in all source domains.

    .. math:: d(F_i, F_j) = \tfrac1D \lVert \mu_i - \mu_j \rVert^2 + \tfrac1{D^2} \lVert C_i - C_j \rVert_F^2

    Batch: ``source`` {image, label, domain}.

    Args:
        means: ``False`` is Deep CORAL's own loss, without the means and with a factor of 1/4.
        **kwargs: see :class:`DomainMatching`.

    Source: Sun and Saenko 2016, arXiv 1607.01719, equation 1; with the means, and between all pairs of source domains,
    as in DomainBed.
    """

    card = Card(
        title="Deep CORAL: Correlation Alignment for Deep Domain Adaptation (between source domains)",
        year=2016,
        paper="arXiv:1607.01719",
        family="domain_adaptation",
        roles=("source",),
    )

    def __init__(self, means: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.means = means

    def discrepancy(self, features: Tensor, domain: Tensor) -> Tensor:
        """Distance of the moments."""
        return pairwise_coral(features, domain, self.num_domains, self.means)


class MMDGeneralization(DomainMatching):
    r"""Features with the same kernel mean in all source domains.

    .. math:: d(F_i, F_j) = \lVert \mathbb E_i \varphi(f) - \mathbb E_j \varphi(f) \rVert^2, \qquad
        \langle \varphi(f), \varphi(f') \rangle = \sum_\gamma e^{-\gamma \lVert f - f' \rVert^2}

    Batch: ``source`` {image, label, domain}.

    Args:
        gammas: of the kernels, each > 0; DomainBed's seven, which are fixed, whatever the size of the features.
        **kwargs: see :class:`DomainMatching`.

    Raises:
        UserError: without kernels, or for one that is not positive.

    Source: Li et al. 2018, Domain Generalization with Adversarial Feature Learning, equation 5 (without its adversarial
    autoencoder, as in DomainBed); Gretton et al. 2012, JMLR 13.
    """

    card = Card(
        title="Domain Generalization with Adversarial Feature Learning (its MMD)",
        year=2018,
        paper="doi:10.1109/CVPR.2018.00566",
        family="domain_adaptation",
        roles=("source",),
    )

    def __init__(self, gammas: Sequence[float] = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not gammas or min(gammas) <= 0.0:
            raise UserError(f"MMDGeneralization: gammas={list(gammas)} must be positive, and at least one")
        self.gammas = tuple(gammas)

    def discrepancy(self, features: Tensor, domain: Tensor) -> Tensor:
        """Maximum mean discrepancy."""
        return pairwise_mmd(features, domain, self.num_domains, self.gammas)
