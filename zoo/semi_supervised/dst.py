"""Debiased Self-Training for Semi-Supervised Learning.

Chen et al., NeurIPS 2022, https://arxiv.org/abs/2202.07136
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.gradient_reversal import reverse_gradient
from zoo.core.schedules import dann_ramp
from zoo.losses import worst_case_loss
from zoo.policies import Policy, Threshold
from zoo.semi_supervised.base import SemiSupervised


def threshold(num_classes: int) -> Policy:
    """The paper's threshold of 0.7."""
    return Threshold(num_classes, threshold=0.7)


class DST(SemiSupervised):
    r"""Pseudo-labels train another head than the one that gives them, and features that could not do much worse.

    .. math:: L = H(y, h(\psi(x))) + \lambda_s H(y, h(\psi(A(x)))) + \lambda\, w(q)\, H(\hat q, h_p(\psi(A(u))))
        + \eta \Big(\eta' H(\hat y, h_w(R(\psi(x)))) - \log\big(1 - p_w(R(\psi(u)))_{\hat q}\big)\Big)

    each a mean over its batch; :math:`\psi` are the features, :math:`\alpha` weak and A strong views, x and u without a
    sign the weak ones, :math:`q = \mathrm{softmax}(h(\psi(u)))`.

    - The main head h learns from labels alone; it gives the pseudo-labels :math:`\hat q` and is evaluated.
    - The pseudo head :math:`h_p` learns from pseudo-labels alone, and the features learn with it.
    - The worst head :math:`h_w` agrees with h on labeled samples and contradicts it on unlabeled ones: the worst that
      such pseudo-labels could be. Behind the gradient reversal R the features make that hard.

    Batch: ``labeled`` {image, strong, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy, which maps weak logits (μB, C) to targets and weights (μB,).
        unlabeled_weight: λ ≥ 0.
        strong_weight: :math:`\lambda_s` ≥ 0, of labels on strong views.
        worst_weight: η ≥ 0.
        labeled_weight: η' ≥ 0; how well the worst head has to fit the labeled samples.
        max_reversal: the factor that R approaches, :math:`0.1 \,(2 / (1 + e^{-t / t_0}) - 1)`.
        ramp_steps: :math:`t_0`, in optimizer steps.
        head_width: hidden units of pseudo and worst head.
        head_dropout: in these heads, in [0, 1).
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Chen et al. 2022, arXiv 2202.07136, section 4; details as in TLlib, where the worst head takes the main
        head's predictions also on labeled samples.
    """

    card = Card(
        title="Debiased Self-Training for Semi-Supervised Learning",
        year=2022,
        paper="arXiv:2202.07136",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    labeled_views: ClassVar[tuple[str, ...]] = ("image", "strong")

    def __init__(
        self,
        policy: Callable[[int], Policy] = threshold,
        unlabeled_weight: float = 1.0,
        strong_weight: float = 0.1,
        worst_weight: float = 1.0,
        labeled_weight: float = 2.0,
        max_reversal: float = 0.1,
        ramp_steps: int = 1000,
        head_width: int = 2048,
        head_dropout: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        weights = {"unlabeled_weight": unlabeled_weight, "strong_weight": strong_weight, "worst_weight": worst_weight}
        for name, value in {**weights, "labeled_weight": labeled_weight, "max_reversal": max_reversal}.items():
            if value < 0.0:
                raise UserError(f"DST: {name}={value} must not be negative")
        if ramp_steps < 1 or head_width < 1 or not 0.0 <= head_dropout < 1.0:
            raise UserError(
                f"DST: ramp_steps={ramp_steps} and head_width={head_width} must be at least 1, "
                f"head_dropout={head_dropout} must lie in [0, 1)"
            )
        self.policy_recipe, self.unlabeled_weight, self.strong_weight = policy, unlabeled_weight, strong_weight
        self.worst_weight, self.labeled_weight = worst_weight, labeled_weight
        self.max_reversal, self.ramp_steps = max_reversal, ramp_steps
        self.head_width, self.head_dropout = head_width, head_dropout

    def build(self) -> None:
        """The networks, the policy and the two heads that are gone after training."""
        super().build()
        self.policy = self.policy_recipe(self.num_classes)
        with torch.random.fork_rng(devices=[]):  # what is random afterwards does not depend on the heads
            self.pseudo_head, self.worst_head = self.extra_head(), self.extra_head()

    def extra_head(self) -> nn.Module:
        """One hidden layer on the features."""
        hidden, dropout = nn.Linear(self.network.num_features, self.head_width), nn.Dropout(self.head_dropout)
        return nn.Sequential(hidden, nn.ReLU(), dropout, nn.Linear(self.head_width, self.num_classes))

    @property
    def reversal(self) -> float:
        """The factor of R at this step."""
        step = self.trainer.global_step if self._trainer is not None else 0
        return self.max_reversal * dann_ramp(step / self.ramp_steps, sharpness=1.0)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels; the pseudo head fits the pseudo-labels; the worst head defies them and the features it."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        views = [labeled["image"], labeled["strong"], unlabeled["weak"], unlabeled["strong"]]
        x, x_strong, u, u_strong = self.together(views, call=self.network.features)
        logits = self.network.logits(torch.cat([x, x_strong]))
        weak_logits, strong_logits = logits[: len(x)], logits[len(x) :]
        with torch.no_grad():
            own = self.network.logits(u)
        targets, weights = self.policy(own, **self.evidence(batch, weak_logits))
        self.watch(unlabeled, targets, weights)

        worst = self.worst_head(reverse_gradient(torch.cat([x, u]), self.reversal))
        unsupervised = weights * cross_entropy(self.pseudo_head(u_strong), targets, reduction="none")
        return self.report(
            supervised=self.criterion(weak_logits, labeled["label"]),
            strong=self.strong_weight * self.criterion(strong_logits, labeled["label"]),
            unlabeled=self.unlabeled_weight * unsupervised.mean(),
            worst_case=self.worst_weight
            * worst_case_loss(
                worst[: len(x)], weak_logits.detach().argmax(1), worst[len(x) :], own.argmax(1), self.labeled_weight
            ),
        )
