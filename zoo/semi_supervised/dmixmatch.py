"""DMixMatch, the semi-supervised method of Harnessing Hard Mixed Samples with Decoupled Regularizer.

Liu et al., NeurIPS 2023, https://arxiv.org/abs/2203.10761
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.heads import Head, Linear
from zoo.core.schedules import cosine_decay
from zoo.losses import blend, decoupled_terms, mixed_targets, mixing_shares
from zoo.semi_supervised.consistency import require_pixels
from zoo.semi_supervised.fixmatch import FixMatch


class DMixMatch(FixMatch):
    r"""FixMatch, and a second head for labeled samples mixed with labeled and with pseudo-labeled ones.

    .. math:: L = L_{\mathrm{FixMatch}} + \lambda_{ll}\, \ell(x_a, x_b) + \rho(t)\, \lambda_{lu}\, v(u_b)\,
        \ell(x_a, u_b), \qquad \ell = H\big(\lambda e_a + (1 - \lambda) e_b,\, p'(\tilde x)\big)
        + \eta \big( \lambda^s r_a + (1 - \lambda)^s r_b \big)

    in the mean over the batch, with :math:`\lambda \ge \tfrac12` on the labeled side, so that what is mixed with a
    pseudo-label stays mostly labeled; :math:`p'` is the second head on the shared features, :math:`r` are the terms of
    :func:`~zoo.losses.decoupled_terms`, and :math:`\rho` rises from 0 to 1 along a cosine. The average of the weights
    labels. A pseudo-label counts in a mixture, :math:`v = 1`, where the policy accepts it or its confidence reaches
    :math:`\max(\tau', 1 - \lambda)`: the smaller its part, the less it need be sure.

    All views and mixtures go through the backbone in one batch; the released code has one forward for each.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        alpha: of the Beta distribution of λ, ≥ 0.
        eta: :math:`\eta` ≥ 0; the released configuration has 1.
        share_power: s ≥ 0; the released configuration has 1, the paper's equation 0.
        decoupled: ``"labeled"`` leaves :math:`r_b` out of mixtures with a pseudo-label, which may be wrong; the
            released configuration has ``"both"``.
        mixture_threshold: :math:`\tau'` in (0, 1], or ``None``: what the policy accepts, as released.
        mixed_labeled_weight: :math:`\lambda_{ll}` ≥ 0.
        mixed_unlabeled_weight: :math:`\lambda_{lu}` ≥ 0.
        mixture_head: recipe of the second head.
        **kwargs: see :class:`~zoo.semi_supervised.fixmatch.FixMatch`.

    Raises:
        UserError: if an argument is out of its range; in training, for inputs that are not pixels.

    Source: Liu et al. 2023, arXiv 2203.10761, section 4; defaults and the second head from the released code.
    """

    card = Card(
        title="Harnessing Hard Mixed Samples with Decoupled Regularizer (DMixMatch)",
        year=2023,
        paper="arXiv:2203.10761",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self,
        alpha: float = 1.0,
        eta: float = 1.0,
        share_power: float = 1.0,
        decoupled: Literal["labeled", "both"] = "both",
        mixture_threshold: float | None = None,
        mixed_labeled_weight: float = 1.0,
        mixed_unlabeled_weight: float = 1.0,
        mixture_head: Callable[[int, int], Head] = Linear,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        weights = {"mixed_labeled_weight": mixed_labeled_weight, "mixed_unlabeled_weight": mixed_unlabeled_weight}
        for name, value in {"alpha": alpha, "eta": eta, "share_power": share_power, **weights}.items():
            if value < 0.0:
                raise UserError(f"DMixMatch: {name}={value} must not be negative")
        if decoupled not in ("labeled", "both"):
            raise UserError(f"DMixMatch: decoupled={decoupled!r} must be 'labeled' or 'both'")
        if mixture_threshold is not None and not 0.0 < mixture_threshold <= 1.0:
            raise UserError(f"DMixMatch: mixture_threshold={mixture_threshold} must lie in (0, 1]")
        self.alpha, self.eta, self.share_power, self.decoupled = alpha, eta, share_power, decoupled
        self.mixture_threshold, self.mixture_head_recipe = mixture_threshold, mixture_head
        self.mixed_labeled_weight, self.mixed_unlabeled_weight = mixed_labeled_weight, mixed_unlabeled_weight

    def build(self) -> None:
        """The networks, the policy and the second head, which only training knows."""
        super().build()
        self.mixture_head = self.mixture_head_recipe(self.network.num_features, self.num_classes)

    def mixture_loss(self, logits: Tensor, first: Tensor, second: Tensor, share: Tensor, both: bool) -> Tensor:
        """ℓ (B,) of mixtures with shares λ (B,) of classes ``first`` (B,) and the rest of classes ``second`` (B,)."""
        own, partner = decoupled_terms(logits, first, second)
        loss = cross_entropy(logits, mixed_targets(first, second, share, self.num_classes), reduction="none")
        rest = (1 - share) ** self.share_power * partner if both else 0.0
        return loss + self.eta * (share**self.share_power * own + rest)

    def trusted(self, weak: Tensor, weights: Tensor, share: Tensor) -> Tensor:
        """Which pseudo-labels count in a mixture, v (B,)."""
        if self.mixture_threshold is None:
            return weights
        cutoff = (1 - share).clamp(min=self.mixture_threshold)
        return torch.maximum(weights, (weak.float().softmax(dim=1).amax(dim=1) >= cutoff).to(weights.dtype))

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """FixMatch with the average's labels, and two kinds of mixtures."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        x, labels = labeled["image"], labeled["label"]
        require_pixels(self, x, unlabeled["weak"])
        weak = self.teacher(unlabeled["weak"])

        count = min(len(x), len(weak))
        partners = torch.randperm(len(x)).to(x.device, non_blocking=True)
        share_ll, share_lu = mixing_shares(len(x) + count, self.alpha).to(x.device).split([len(x), count])
        mixed_ll = blend(x, x[partners], share_ll)
        mixed_lu = blend(x[:count], unlabeled["weak"][:count], share_lu)
        plain, strong, mixed_ll, mixed_lu = self.together(
            [x, unlabeled["strong"], mixed_ll, mixed_lu], call=self.network.features
        )
        logits, strong = self.network.logits(plain), self.network.logits(strong)
        targets, weights = self.policy(weak, **self.evidence(batch, logits))
        self.watch(unlabeled, targets, weights)

        classes = (targets if targets.ndim == 1 else targets.argmax(dim=1))[:count]
        loss_ll = self.mixture_loss(self.mixture_head(mixed_ll), labels, labels[partners], share_ll, both=True)
        loss_lu = self.mixture_loss(
            self.mixture_head(mixed_lu), labels[:count], classes, share_lu, both=self.decoupled == "both"
        )
        ramp = 1.0 - cosine_decay(self.progress)
        return self.report(
            supervised=self.criterion(logits, labels),
            unlabeled=self.unlabeled_weight * (weights * cross_entropy(strong, targets, reduction="none")).mean(),
            mixed_labeled=self.mixed_labeled_weight * loss_ll.mean(),
            mixed_unlabeled=ramp
            * self.mixed_unlabeled_weight
            * (self.trusted(weak[:count], weights[:count], share_lu) * loss_lu).mean(),
        )
