"""Domain-adversarial training between source domains.

Ganin et al., JMLR 2016, https://arxiv.org/abs/1505.07818; Li et al., ECCV 2018 (conditional); for domain generalization
as in Gulrajani and Lopez-Paz, ICLR 2021, https://arxiv.org/abs/2007.01434
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from zoo.core.card import Card
from zoo.core.distributed import sum_across_ranks, world_size
from zoo.core.errors import UserError
from zoo.core.gradient_reversal import reverse_gradient
from zoo.core.schedules import dann_ramp
from zoo.domain_adaptation.generalization import Batch, DomainGeneralization
from zoo.losses.domain_means import mean_over_domains


class DomainClassifier(nn.Module):
    """Features (B, D) to logits (B, S) of the S domains, by a multi-layer perceptron.

    The defaults are DomainBed's.

    Args:
        in_features: D.
        num_domains: S.
        hidden: width of the hidden layers.
        layers: their number, ≥ 1.
    """

    def __init__(self, in_features: int, num_domains: int, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"DomainClassifier: layers={layers} must be at least 1")
        modules: list[nn.Module] = []
        for width in [in_features] + [hidden] * (layers - 1):
            modules += [nn.Linear(width, hidden), nn.ReLU()]
        self.layers = nn.Sequential(*modules, nn.Linear(hidden, num_domains))

    def forward(self, features: Tensor) -> Tensor:
        """Domain logits."""
        return self.layers(features)  # type: ignore[no-any-return]


class DomainAdversarialGeneralization(DomainGeneralization):
    r"""Features from which the label can be told, and not which of the source domains they are from.

    .. math:: L = \tfrac1S \sum_s R_s + w\, H\big( d, D(R_\lambda(f)) \big)

    :math:`R_\lambda` reverses the gradient, so that with one optimizer and in one step the classifier D of the S source
    domains minimises its loss, and the features maximise λ times it.

    This is not :class:`~zoo.domain_adaptation.dann.DANN`, which tells source from target: no target is seen here. Nor
    is it DomainBed's code to the letter, which has no reversal layer: it alternates steps of D and of the features and
    the label classifier, each with an Adam of its own (rate 5e-5, β₁ = 0.5), so that half of its steps learn no label.

    Batch: ``source`` {image, label, domain}.

    Args:
        classifier: D, from the numbers of features and of domains to a network.
        domain_weight: w ≥ 0, 1 in DomainBed; with 0 the network learns as in :class:`~zoo.domain_adaptation.erm.ERM`.
        reversal: λ ≥ 0. DomainBed's λ is this one, 1.
        ramp: share of training over which λ grows to that value as in DANN's paper; 0 is from the start, as DomainBed.
        conditional: CDANN: an embedding of the label is added to what D sees, and every class counts alike, so that
            the domains may have different frequencies of the classes.
        **kwargs: see :class:`~zoo.domain_adaptation.generalization.DomainGeneralization`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Ganin et al. 2016, arXiv 1505.07818, equation 10; Li et al. 2018, doi 10.1007/978-3-030-01267-0_38; both
    between source domains as in Gulrajani and Lopez-Paz 2021, arXiv 2007.01434.
    """

    card = Card(
        title="Domain-Adversarial Training of Neural Networks (between source domains)",
        year=2016,
        paper="arXiv:1505.07818",
        family="domain_adaptation",
        roles=("source",),
    )

    def __init__(
        self,
        classifier: Callable[[int, int], nn.Module] = DomainClassifier,
        domain_weight: float = 1.0,
        reversal: float = 1.0,
        ramp: float = 0.0,
        conditional: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        if not domain_weight >= 0.0 or not reversal >= 0.0:
            raise UserError(f"{name}: domain_weight={domain_weight} and reversal={reversal} must not be negative")
        if not 0.0 <= ramp <= 1.0:
            raise UserError(f"{name}: ramp={ramp} must lie in [0, 1], a share of the training")
        self.classifier_recipe, self.domain_weight = classifier, domain_weight
        self.reversal, self.ramp, self.conditional = reversal, ramp, conditional

    def build(self) -> None:
        """The network, and the classifier of its features' domains."""
        super().build()
        with torch.random.fork_rng(devices=[]):  # what is random afterwards does not depend on them
            self.domain_classifier = self.classifier_recipe(self.network.num_features, self.num_domains)
            if self.conditional:
                self.embedding = nn.Embedding(self.num_classes, self.network.num_features)

    @property
    def strength(self) -> float:
        """λ at this step."""
        return self.reversal * (dann_ramp(min(self.progress / self.ramp, 1.0)) if self.ramp else 1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit the labels, and confuse the classifier of domains, which learns not to be confused."""
        source = batch["source"]
        features = self.network.features(source["image"])
        risks, counts = self.risks(self.network.logits(features), source)
        seen = reverse_gradient(features, self.strength)
        if self.conditional:
            seen = seen + self.embedding(source["label"])
        domains = self.domain_classifier(seen)
        losses = cross_entropy(domains, source["domain"], reduction="none")
        if self.logs_now:
            right = domains.detach().argmax(dim=1) == source["domain"]
            self.observe(domain_accuracy=right.float().mean())
        weights = self.class_balance(source["label"]) if self.conditional else torch.ones_like(losses)
        return self.report(
            source=mean_over_domains(risks, counts),
            domain=self.domain_weight * (weights * losses).mean(),
        )

    def class_balance(self, labels: Tensor) -> Tensor:
        """Weights (B,), on average 1, with which every class of the batch, that of all ranks, counts alike."""
        members = one_hot(labels, self.num_classes).float()
        counts = sum_across_ranks(members.sum(dim=0))
        present = (counts > 0).float().sum()
        return (world_size() * len(labels) / present) * (members / counts.clamp(min=1)).sum(dim=1)
