"""Dash: Semi-Supervised Learning with Dynamic Thresholding.

Xu et al., ICML 2021, https://arxiv.org/abs/2109.00650
"""

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.losses import mean_of_kept
from zoo.policies import DynamicThreshold, Policy
from zoo.semi_supervised.fixmatch import FixMatch


class Dash(FixMatch):
    r"""FixMatch on the pseudo-labels whose loss is below a bound that falls from that of the labeled samples.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + \lambda \frac{\sum_b w_b\, H(\hat q_b,
        p(A(u_b)))}{\max(\sum_b w_b, 1)}, \quad w_b = \mathbb 1[-\log \max q_b \le \rho_t]

    Labels alone are learned during the warm-up, which also gives the first bound, see
    :class:`~zoo.policies.dash.DynamicThreshold`. As in the released code the mean runs over the samples that are kept,
    of all ranks; that code also multiplies by 0.9, which is left to ``unlabeled_weight``. Warm-up and falls are counted
    in steps: give the policy lengths that suit the run.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy.
        average: over which unlabeled samples the loss is a mean: ``"kept"``, or ``"all"`` as in FixMatch and USB.
        **kwargs: see :class:`~zoo.semi_supervised.fixmatch.FixMatch`.

    Raises:
        UserError: if ``average`` is unknown.

    Source: Xu et al. 2021, arXiv 2109.00650, algorithm 1.
    """

    card = Card(
        title="Dash: Semi-Supervised Learning with Dynamic Thresholding",
        year=2021,
        paper="arXiv:2109.00650",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self,
        policy: Callable[[int], Policy] = DynamicThreshold,
        average: Literal["kept", "all"] = "kept",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy=policy, **kwargs)
        if average not in ("kept", "all"):
            raise UserError(f"Dash: average={average!r} must be 'kept' or 'all'")
        self.average = average

    def on_train_start(self) -> None:
        """Say so where the run ends within the warm-up, whose length is that of the paper's runs unless given."""
        super().on_train_start()
        steps = self.trainer.estimated_stepping_batches * self.trainer.accumulate_grad_batches
        if isinstance(self.policy, DynamicThreshold) and self.policy.warmup_steps >= steps:
            rank_zero_warn(
                f"Dash: the policy's warmup_steps={self.policy.warmup_steps} are not fewer than the run's {steps}"
                " steps: it learns from the labels alone"
            )

    def losses(
        self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Fit the labels, and the strong views to the weak views of small loss."""
        logits, strong = outputs[:2]
        pseudo_labels, weights = targets
        losses = cross_entropy(strong, pseudo_labels, reduction="none")
        mean = mean_of_kept(losses, weights) if self.average == "kept" else (weights * losses).mean()
        return {
            "supervised": self.criterion(logits, batch["labeled"]["label"]),
            "unlabeled": self.unlabeled_weight * mean,
        }
