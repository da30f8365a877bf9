"""Adversarial Discriminative Domain Adaptation (ADDA).

Tzeng et al., CVPR 2017, https://arxiv.org/abs/1702.05464
"""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.teachers import Frozen
from zoo.domain_adaptation.adversarial import Discriminating
from zoo.losses.adversarial import domain_loss, inverted_domain_loss
from zoo.optim.partial import PartialSteps


class ADDA(PartialSteps, Discriminating):
    r"""First learn on the source; then a copy learns to make the target look like what the first made of the source.

    .. math:: \min_{M_s, C} \tfrac1{B_s} \sum_i H(y_i^s, C(M_s(x_i^s))); \qquad
        \min_D L_d\big( D(M_s(x^s)), D(M_t(x^t)) \big), \quad
        \min_{M_t} -\tfrac1{B_t} \sum_j \log \sigma(D(M_t(x_j^t))), \quad M_t = M_s \text{ at first}

    One run: for the share ``pretrain`` of its steps the network learns the labels; then it is copied, the copy
    :math:`M_s` is frozen, and the network, as :math:`M_t`, adapts together with D. The head C stays as it was learnt,
    and the optimizer begins anew. The network is what is evaluated all along.

    Batch: ``source`` {image, label}, ``target`` {image}.

    Args:
        pretrain: share of the run in [0, 1); with 0 the network must come with weights.
        inverted: target features learn from the inverted label, as in the paper; ``False`` reverses the
            discriminator's gradient, as TLlib does (with ``max_reversal=2, ramp_steps=10000``).
        **kwargs: see :class:`~zoo.domain_adaptation.adversarial.Discriminating`; ``domain_weight`` multiplies both
            losses, ``max_reversal`` and ``ramp_steps`` count from the start of the adaptation and only if not inverted.

    Raises:
        UserError: for an argument out of its range.

    Source: Tzeng et al. 2017, arXiv 1702.05464, section 4. :math:`L_d` is halved, and both updates are one step, as
    in the authors' code.
    """

    card = Card(
        title="Adversarial Discriminative Domain Adaptation",
        year=2017,
        paper="arXiv:1702.05464",
        family="domain_adaptation",
        roles=("source", "target"),
    )
    published_forward_pass: ClassVar[Literal["joint", "split"]] = "split"
    started: Tensor

    def __init__(self, pretrain: float = 0.5, inverted: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= pretrain < 1.0:
            raise UserError(f"ADDA: pretrain={pretrain} must lie in [0, 1), a share of the run")
        if self.forward_pass == "joint":
            raise UserError("ADDA: forward_pass=joint cannot be, as each domain has a network of its own")
        self.pretrain, self.inverted = pretrain, inverted
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._adapting: bool | None = False  # `started` on the host

    def build(self) -> None:
        """The network, the copy that will be frozen, and the discriminator."""
        super().build()
        self.source_network = Frozen(copy.deepcopy(self.network))

    @property
    def resting(self) -> Iterable[nn.Module]:
        """The discriminator at first, the head later."""
        return [self.network.head if self._adapting else self.discriminator]

    @property
    def ramp(self) -> float:
        """How far the ramp is, p in [0, 1], since the adaptation began."""
        if self._trainer is None or not (steps := self.trainer.estimated_stepping_batches) < float("inf"):
            return 0.0
        length = self.ramp_steps or (1.0 - self.pretrain) * steps
        return min(max(self.trainer.global_step - self.pretrain * steps, 0.0) / length, 1.0)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Learn the source, or adapt to the target."""
        source, target = batch["source"], batch["target"]
        if self._adapting is None:  # just loaded
            self._adapting = bool(self.started)
        if not self._adapting and self.progress >= self.pretrain:
            self.begin()
        if not self._adapting:
            return self.report(source=cross_entropy(self.network(source["image"]), source["label"])) + self.at_rest()
        with torch.no_grad():
            frozen: Any = self.source_network.module
            source_features = frozen.features(source["image"])
        terms = self.alignment(source_features, self.network.features(target["image"]), source_features)
        return self.report(**terms) + self.at_rest()

    def begin(self) -> None:
        """Freeze a copy of what was learnt on the source; the network goes on for the target."""
        self.source_network.module.load_state_dict(self.network.state_dict())
        self.started = torch.ones_like(self.started)
        self._adapting = True
        if self._trainer is not None:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.state.clear()

    def alignment(self, source: Tensor, target: Tensor, source_logits: Tensor) -> dict[str, Tensor]:
        """The discriminator's loss, and what the target's features make of it."""
        if not self.inverted:
            return {"domain": self.domain_weight * domain_loss(*self.tell_apart(source, target))}
        domains = self.tell_apart(source, target.detach())
        weights = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        with frozen_batch_norm(self.discriminator):
            fooled = functional_call(self.discriminator, weights, (torch.cat([source, target]),))[len(source) :]
        return {
            "domain": self.domain_weight * domain_loss(*domains),
            "mapping": self.domain_weight * inverted_domain_loss(fooled),
        }

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._adapting = None
        super()._load_from_state_dict(*args, **kwargs)
