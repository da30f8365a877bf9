"""Domain-Adversarial Training of Neural Networks.

Ganin et al., JMLR 2016, https://arxiv.org/abs/1505.07818
"""

from torch import Tensor

from zoo.core.card import Card
from zoo.domain_adaptation.adversarial import Discriminating
from zoo.losses.adversarial import domain_loss


class DANN(Discriminating):
    r"""Features from which the label can be told and the domain cannot.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, C(G(x_i^s)))
        + w \, L_d\big( D(R_\lambda(G(x^s))), D(R_\lambda(G(x^t))) \big)

    :math:`R_\lambda` reverses the gradient, so that the one optimizer lets the discriminator D minimise the domain loss
    and the features G maximise it. With w = 0 and ``forward_pass="split"`` every parameter of the network learns as in
    :class:`~zoo.domain_adaptation.source_only.SourceOnly`, bit for bit.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        **kwargs: see :class:`~zoo.domain_adaptation.adversarial.Discriminating` and
            :class:`~zoo.domain_adaptation.adversarial.Adversarial`; w = 1, :math:`\lambda_{\max}` = 1 and a ramp over
            the whole run are the paper's. Paper and TLlib pass the domains jointly. The discriminator always sees both
            in one batch.

    Source: Ganin et al. 2016, arXiv 1505.07818, equations 8-10 and 13-18, section 5.2.
    """

    card = Card(
        title="Domain-Adversarial Training of Neural Networks",
        year=2016,
        paper="arXiv:1505.07818",
        family="domain_adaptation",
        roles=("source", "target"),
    )

    def alignment(self, source: Tensor, target: Tensor, source_logits: Tensor) -> dict[str, Tensor]:
        """Confuse the discriminator, which learns not to be confused."""
        source_domains, target_domains = self.tell_apart(source, target)
        return {"domain": self.domain_weight * domain_loss(source_domains, target_domains)}  # eq. 8
