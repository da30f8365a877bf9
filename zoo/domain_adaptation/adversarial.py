"""What methods share whose features learn against an adversary, by gradient reversal."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.core.errors import UserError
from zoo.core.gradient_reversal import reverse_gradient
from zoo.core.schedules import dann_ramp
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.domain_adaptation.discriminators import DomainDiscriminator
from zoo.losses.adversarial import domain_accuracy


class Adversarial(DomainAdaptation):
    r"""Base of methods that fit the source labels while an adversary stands behind a reversed gradient.

    The reversal :math:`R_\lambda` is the identity forward and multiplies the gradient by :math:`-\lambda` backward, so
    that one backward pass and one optimizer let the adversary minimise a loss and the features maximise it. The
    adversary's gradient does not depend on :math:`\lambda = \lambda_{\max} (2 / (1 + e^{-10 p}) - 1)`.

    Args:
        domain_weight: w ≥ 0 of the adversary's loss, TLlib's trade-off.
        ramp_steps: optimizer steps from p = 0 to p = 1; ``None`` is the whole run, as in the DANN paper. TLlib's
            ``max_iters=1000`` is 10,000 whatever the length of the run; from there on λ stays at 0.9999. 0 is a
            constant :math:`\lambda_{\max}`, as in pytorch-adapt.
        max_reversal: :math:`\lambda_{\max}` ≥ 0.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`.

    Raises:
        UserError: for an argument out of its range.
    """

    def __init__(
        self, domain_weight: float = 1.0, ramp_steps: int | None = None, max_reversal: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        if ramp_steps is not None and ramp_steps < 0:
            raise UserError(f"{name}: ramp_steps={ramp_steps} must not be negative; null is the whole run")
        for argument, value in (("domain_weight", domain_weight), ("max_reversal", max_reversal)):
            if value < 0:
                raise UserError(f"{name}: {argument}={value} must not be negative")
        self.domain_weight, self.ramp_steps, self.max_reversal = domain_weight, ramp_steps, max_reversal

    @property
    def reversal(self) -> float:
        """λ at this step. It depends on the trainer's step alone, so a resumed run goes on where it was."""
        return self.max_reversal * (1.0 if self.ramp_steps == 0 else dann_ramp(self.ramp))

    @property
    def ramp(self) -> float:
        """How far the ramp is, p in [0, 1]; 0 outside a trainer."""
        if self.ramp_steps is None:
            return self.progress
        return min(self.trainer.global_step / self.ramp_steps, 1.0) if self._trainer is not None else 0.0

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels, with the adversary's terms beside."""
        source, target = batch["source"], batch["target"]
        source_features, target_features = self.both(source["image"], target["image"])
        logits = self.network.logits(source_features)
        return self.report(
            source=cross_entropy(logits, source["label"]), **self.alignment(source_features, target_features, logits)
        )

    @abstractmethod
    def alignment(self, source: Tensor, target: Tensor, source_logits: Tensor) -> dict[str, Tensor]:
        """The terms beside the source labels', by name.

        Args:
            source: features of the source (B_s, D).
            target: features of the target (B_t, D).
            source_logits: (B_s, C).
        """


class Discriminating(Adversarial):
    """Base of adversarial methods whose adversary tells the domains apart.

    Args:
        discriminator: from the number of features to a network with one domain logit a sample, positive for source.
        **kwargs: see :class:`Adversarial`.
    """

    def __init__(self, discriminator: Callable[[int], nn.Module] = DomainDiscriminator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.discriminator_recipe = discriminator

    def build(self) -> None:
        """The network and the discriminator."""
        super().build()
        with torch.random.fork_rng(devices=[]):  # what is random afterwards does not depend on the discriminator
            self.build_discriminator()

    def build_discriminator(self) -> None:
        """The discriminator of the features; override it for what sees something else."""
        self.discriminator = self.discriminator_recipe(self.network.num_features)

    def tell_apart(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Domain logits of both domains, in one batch, behind the reversal."""
        domains = self.discriminator(reverse_gradient(torch.cat([source, target]), self.reversal))
        source_domains, target_domains = domains[: len(source)], domains[len(source) :]
        if self.logs_now:
            self.observe(
                domain_accuracy=domain_accuracy(source_domains.detach(), target_domains.detach()),
                reversal=torch.tensor(self.reversal),
            )
        return source_domains, target_domains
