"""Rich Feature Construction for the Optimization-Generalization Dilemma (RFC, also Bonsai).

Zhang et al., ICML 2022, https://arxiv.org/abs/2203.15516
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.method import Method
from zoo.losses.worst_group import round_groups, worst_group_loss

Batch = dict[str, dict[str, Tensor]]


class RichFeatureDiscovery(Method):
    r"""A round that finds what earlier rounds did not use.

    .. math:: L = \max_{r < R} \max \Big( \operatorname*{mean}_{i: \hat y_i^r = y_i} H(y_i, p(x_i)),
        \operatorname*{mean}_{i: \hat y_i^r \ne y_i} H(y_i, p(x_i)) \Big)

    What round r goes by is right on all of its first group and on none of its second: a network that goes by it again
    has the largest loss there is. The first round has no earlier one, and L is the mean over all samples; how long it
    is trained decides what comes first. The groups are of all domains together.

    A round is a fit of a fresh network on a :class:`~datamodules.rounds.RoundsData` and then a ``predict``, whose file
    the later rounds read. :class:`RichFeatureSynthesis` puts the rounds together.

    Batch: ``source`` {image, label, rounds}; no ``rounds`` in the first.

    Args:
        **kwargs: see :class:`~zoo.core.method.Method`. The authors add 0.0011 times the squared norm of all parameters,
            which is Adam's ``weight_decay: 0.0022`` with ``decay_norms_and_biases: true``.

    Source: Zhang et al. 2022, arXiv 2203.15516, algorithm 1; groups of a batch stand for those of the whole set, which
        the authors' code takes at every step, so batches should be large.
    """

    card = Card(
        title="Rich Feature Construction for the Optimization-Generalization Dilemma: discovery",
        year=2022,
        paper="arXiv:2203.15516",
        family="domain_adaptation",
        roles=("source",),
    )
    source_views: ClassVar[tuple[str, ...]] = ("image",)
    target_views: ClassVar[tuple[str, ...]] = ()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit the labels of all samples, or of the group that is fitted worst."""
        source = batch["source"]
        logits = self.network(source["image"])
        if "rounds" not in source:
            return self.report(source=cross_entropy(logits, source["label"]))
        groups = round_groups(source["rounds"], source["label"])
        losses = cross_entropy(logits, source["label"], reduction="none")
        if self.logs_now:
            wrong = groups[:, -1].float()  # of the last round
            right = (logits.argmax(dim=1) == source["label"]).float()
            self.observe(accuracy_where_last_was_wrong=(right * wrong).sum() / wrong.sum().clamp(min=1))
        return self.report(worst_group=worst_group_loss(losses, groups))


class RichFeatureSynthesis(Method):
    r"""One network whose features tell what every round predicted.

    .. math:: L = \tfrac1R \sum_r \tfrac1B \sum_i H(\hat y_i^r, h_r(\phi(x_i)))

    The batches have one half of samples on which all rounds are right or all wrong, and one half of the others:
    ``sampling: agreement`` in :class:`~datamodules.rounds.RoundsData`. The network's own head is the mean of the R
    heads h, weights and biases, and so its logits are the mean of theirs; it is what is evaluated. Any method of domain
    generalization then begins with ``network.weights: CHECKPOINT``; with ``lr_multipliers: {network.backbone: 0}`` the
    features stay what they are (but BatchNorm, which the authors' network lacks, goes on averaging), their RFC (cf).

    Batch: ``source`` {image, label (evaluation only), rounds}.

    Args:
        rounds: R ≥ 1, as many as the data has.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: for fewer rounds than 1, other rounds than those of the data, or a head that is not linear.

    Source: Zhang et al. 2022, arXiv 2203.15516, algorithm 1; the mean of the heads as in the authors' code.
    """

    card = Card(
        title="Rich Feature Construction for the Optimization-Generalization Dilemma: synthesis",
        year=2022,
        paper="arXiv:2203.15516",
        family="domain_adaptation",
        roles=("source",),
    )
    source_views: ClassVar[tuple[str, ...]] = ("image",)
    target_views: ClassVar[tuple[str, ...]] = ()

    def __init__(self, rounds: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if rounds < 1:
            raise UserError(f"RichFeatureSynthesis: rounds={rounds} must be at least 1")
        self.rounds = rounds

    def build(self) -> None:
        """The network, and a head for every round; the network's own only follows them."""
        super().build()
        head = self.network.head
        if not isinstance(head, nn.Linear):
            raise UserError(f"RichFeatureSynthesis: heads of {type(head).__name__} have no mean; it must be Linear")
        make, size, bias = type(head), self.network.num_features, head.bias is not None
        self.heads = nn.ModuleList(make(size, self.num_classes, bias=bias) for _ in range(self.rounds))
        head.requires_grad_(False)
        self.average_heads()

    @torch.no_grad()
    def average_heads(self) -> None:
        """Bring the network's head to the mean of the others."""
        for name, parameter in self.network.head.named_parameters():
            parameter.copy_(torch.stack([head.get_parameter(name) for head in self.heads]).mean(dim=0))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit what every round predicted, each with a head of its own."""
        source = batch["source"]
        found = source["rounds"].shape[1] if "rounds" in source else 0
        if found != self.rounds:
            raise UserError(
                f"RichFeatureSynthesis: rounds={self.rounds}, but the data has {found}; data.rounds lists the files "
                "that the rounds' predictions are in"
            )
        features = self.network.dropout(self.network.features(source["image"]))
        logits = torch.stack([head(features) for head in self.heads], dim=1)
        losses = cross_entropy(logits.flatten(0, 1), source["rounds"].flatten(), reduction="none").view(-1, found)
        if self.logs_now:
            same = (logits.argmax(dim=2) == source["rounds"]).float().mean(dim=0)
            self.observe(**{f"accuracy_of_round_{r}": value for r, value in enumerate(same)})
        return self.report(rounds=losses.mean())

    def on_train_batch_end(self, *args: Any) -> None:
        """The network's head follows."""
        super().on_train_batch_end(*args)
        self.average_heads()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With the head of this moment: a checkpoint may be written before the step has ended."""
        if self.built:
            self.average_heads()
        return super().state_dict(*args, **kwargs)
