"""Domain-Adversarial Training of Neural Networks.

Ganin et al., JMLR 2016, https://arxiv.org/abs/1505.07818
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.gradient_reversal import reverse_gradient
from zoo.core.schedules import dann_ramp
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.domain_adaptation.discriminators import DomainDiscriminator
from zoo.losses.adversarial import domain_accuracy, domain_loss


class DANN(DomainAdaptation):
    r"""Features from which the label can be told and the domain cannot.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, C(G(x_i^s)))
        + w \, L_d\big( D(R_\lambda(G(x^s))), D(R_\lambda(G(x^t))) \big)

    :math:`R_\lambda` is the identity forward and multiplies the gradient by :math:`-\lambda` backward, so that the one
    optimizer lets the discriminator D minimise the domain loss and the features G maximise it. The gradient of D does
    not depend on :math:`\lambda = 2 / (1 + e^{-10 p}) - 1`, where p is the completed fraction of training.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        discriminator: from the number of features to a network with one domain logit a sample, positive for source.
        domain_weight: w ≥ 0, TLlib's trade-off; 1 in the paper. With 0 and ``forward_pass="split"`` every parameter of
            the network learns as in :class:`~zoo.domain_adaptation.source_only.SourceOnly`, bit for bit.
        ramp_steps: optimizer steps from p = 0 to p = 1; ``None`` is the whole run, as in the paper. TLlib's schedule is
            10,000 whatever the length of the run; from there on it stays at 1, where λ = 0.9999.
        max_reversal: the value that λ approaches.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`; paper and TLlib pass the domains jointly.
            The discriminator always sees both in one batch.

    Source: Ganin et al. 2016, arXiv 1505.07818, equations 8-10 and 13-18, section 5.2.
    """

    card = Card(
        title="Domain-Adversarial Training of Neural Networks",
        year=2016,
        paper="arXiv:1505.07818",
        family="domain_adaptation",
        roles=("source", "target"),
    )

    def __init__(
        self,
        discriminator: Callable[[int], nn.Module] = DomainDiscriminator,
        domain_weight: float = 1.0,
        ramp_steps: int | None = None,
        max_reversal: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if ramp_steps is not None and ramp_steps < 1:
            raise ValueError(f"DANN: ramp_steps={ramp_steps} must be at least 1, or null for the whole run")
        self.discriminator_recipe, self.domain_weight = discriminator, domain_weight
        self.ramp_steps, self.max_reversal = ramp_steps, max_reversal

    def build(self) -> None:
        """The network and the discriminator of its features."""
        super().build()
        with torch.random.fork_rng(devices=[]):  # what is random afterwards does not depend on the discriminator
            self.discriminator = self.discriminator_recipe(self.network.num_features)

    @property
    def reversal(self) -> float:
        """λ at this step. It depends on the trainer's step alone, so a resumed run goes on where it was."""
        if self.ramp_steps is None:
            return self.max_reversal * dann_ramp(self.progress)
        step = self.trainer.global_step if self._trainer is not None else 0
        return self.max_reversal * dann_ramp(min(step / self.ramp_steps, 1.0))

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels and confuse the discriminator, which learns not to be confused."""
        source, target = batch["source"], batch["target"]
        source_features, target_features = self.both(source["image"], target["image"])
        logits = self.network.logits(source_features)
        reversed_features = reverse_gradient(torch.cat([source_features, target_features]), self.reversal)
        domains = self.discriminator(reversed_features)
        domains_s, domains_t = domains[: len(source_features)], domains[len(source_features) :]
        if self.logs_now:
            self.observe(
                domain_accuracy=domain_accuracy(domains_s.detach(), domains_t.detach()),
                reversal=torch.tensor(self.reversal),
            )
        return self.report(
            source=cross_entropy(logits, source["label"]),
            domain=self.domain_weight * domain_loss(domains_s, domains_t),  # eq. 8, minimised by D, maximised by G
        )
