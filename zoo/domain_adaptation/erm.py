"""Empirical risk minimization: the baseline of domain generalization, which few methods beat.

Vapnik 1998; as such a baseline Gulrajani and Lopez-Paz, ICLR 2021, https://arxiv.org/abs/2007.01434
"""

from torch import Tensor

from zoo.core.card import Card
from zoo.domain_adaptation.generalization import Batch, DomainGeneralization
from zoo.losses.domain_means import mean_over_domains


class ERM(DomainGeneralization):
    r"""The mean of the risks of all source domains.

    .. math:: L = \tfrac1S \sum_s R_s, \qquad R_s = \frac1{n_s} \sum_{i: d_i = s} H(y_i, p(x_i))

    With as many samples of every domain it is the mean over the batch.

    Batch: ``source`` {image, label, domain}.

    Source: Vapnik 1998; Gulrajani and Lopez-Paz 2021, arXiv 2007.01434, section 4.
    """

    card = Card(
        title="In Search of Lost Domain Generalization: the ERM baseline",
        year=1998,
        paper="arXiv:2007.01434",
        family="domain_adaptation",
        roles=("source",),
    )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit the labels of all domains alike."""
        source = batch["source"]
        return self.report(source=mean_over_domains(*self.risks(self.network(source["image"]), source)))
