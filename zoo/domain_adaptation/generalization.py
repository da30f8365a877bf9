"""What methods share that learn from several source domains and never see the target."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.errors import UserError
from zoo.core.method import Method
from zoo.losses.domain_means import domain_means, mean_over_domains

Batch = dict[str, dict[str, Tensor]]


class DomainGeneralization(Method):
    r"""Base of methods on ``source`` {image, label, domain} with as many samples of every domain.

    All domains go through the network in one batch, as in DomainBed's ERM, IRM and V-REx. (Its GroupDRO, CORAL and MMD
    pass each domain on its own, which is something else where there is BatchNorm.) What a method takes from the domains
    is a mean over the samples of all ranks: two ranks equal one on the joint batch.

    Args:
        num_domains: S ≥ 1, the number of source domains.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: for fewer domains than 1, and before training where the data has another number of them.
    """

    source_views: ClassVar[tuple[str, ...]] = ("image",)
    target_views: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_domains: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_domains < 1:
            raise UserError(f"{type(self).__name__}: num_domains={num_domains} must be at least 1")
        self.num_domains = num_domains

    def setup(self, stage: str) -> None:
        """Check that the data has as many source domains."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "num_domains", self.num_domains)
        if stage == "fit" and found != self.num_domains:
            raise UserError(
                f"{type(self).__name__}: num_domains={self.num_domains}, but {type(data).__name__} has {found} source "
                "domains"
            )

    def risks(self, logits: Tensor, source: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of every domain (S,), and their numbers of samples (S,); no sample, no risk."""
        losses = cross_entropy(logits, source["label"], reduction="none")
        risks, counts = domain_means(losses, source["domain"], self.num_domains)
        if self.logs_now:
            self.observe(worst_risk=risks.max())
        return risks, counts


class AnnealedPenalty(DomainGeneralization):
    r"""Base of methods that add to the mean risk a penalty whose weight jumps once.

    .. math:: L = \tfrac1S \sum_s R_s + w_t P, \qquad w_t = w \text{ from step } T \text{ on, and } w_0 \text{ before}

    The jump is as large as it is because a strong penalty at the start keeps the network from learning anything.

    Args:
        penalty_weight: w ≥ 0.
        annealing_steps: T ≥ 0, in optimizer steps.
        early_weight: w₀ ≥ 0.
        reset_optimizer: forget the optimizer's moments at step T, as DomainBed does with Adam, whose steps would
            otherwise be sized by the small gradients before the jump.
        rescale: divide the loss by w_t where that is above 1, as the authors of IRM do. Adam does not notice; with
            plain gradient descent the learning rate need not shrink. Their loss has the squared norm of the weights in
            it, which is divided too; a ``weight_decay`` of the optimizer is not.
        **kwargs: see :class:`DomainGeneralization`.

    Raises:
        UserError: if a weight or ``annealing_steps`` is negative.
    """

    def __init__(
        self,
        penalty_weight: float,
        annealing_steps: int,
        early_weight: float,
        reset_optimizer: bool = True,
        rescale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        ranges = {"penalty_weight": penalty_weight, "annealing_steps": annealing_steps, "early_weight": early_weight}
        for name, value in ranges.items():
            if not value >= 0:
                raise UserError(f"{type(self).__name__}: {name}={value} must not be negative")
        self.penalty_weight, self.annealing_steps, self.early_weight = penalty_weight, annealing_steps, early_weight
        self.reset_optimizer, self.rescale = reset_optimizer, rescale

    @property
    def weight(self) -> float:
        """The weight w at this step. It depends on the trainer's step alone, so a resumed run goes on where it was."""
        step = self.trainer.global_step if self._trainer is not None else 0
        return self.penalty_weight if step >= self.annealing_steps else self.early_weight

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Forget the moments at the jump."""
        super().on_train_batch_start(batch, batch_idx)
        if self.reset_optimizer and self.trainer.global_step == self.annealing_steps:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.state.clear()

    def penalized(self, risks: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
        """The loss, from the risks (S,), the numbers of samples (S,) and the scalar penalty."""
        weight = self.weight
        scale = max(weight, 1.0) if self.rescale else 1.0
        self.observe(raw_penalty=penalty)
        return self.report(source=mean_over_domains(risks, counts) / scale, penalty=weight / scale * penalty)
