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
from zoo.losses.decoupled_mixup import term_weight
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
        labeler: whose predictions label, the average's as released.
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
        labeler: Literal["student", "teacher"] = "teacher",
        **kwargs: Any,
    ) -> None:
        super().__init__(labeler=labeler, **kwargs)
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
        rest = term_weight(1 - share, self.share_power) * partner if both else 0.0
        return loss + self.eta * (term_weight(share, self.share_power) * own + rest)

    def student(self, batch: dict[str, dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """FixMatch's logits, then those of both kinds of mixtures, their shares, and who was mixed with whom."""
        x, weak, strong = batch["labeled"]["image"], batch["unlabeled"]["weak"], batch["unlabeled"]["strong"]
        require_pixels(self, x, weak)
        count = min(len(x), len(weak))
        partners = torch.randperm(len(x)).to(x.device, non_blocking=True)
        shares = mixing_shares(len(x) + count, self.alpha).to(x.device, non_blocking=True)
        share_ll, share_lu = shares.split([len(x), count])
        mixtures = [blend(x, x[partners], share_ll), blend(x[:count], weak[:count], share_lu)]
        watched = [weak] if self.labeler == "student" else []
        plain, strong, mixed_ll, mixed_lu, *watched = self.together(
            [x, strong, *mixtures], watched, self.network.features
        )
        own = [self.network.logits(features) for features in (plain, strong)]
        own += [self.network.logits(features).detach() for features in watched]
        return (*own, self.mixture_head(mixed_ll), self.mixture_head(mixed_lu), share_ll, share_lu, partners)

    def losses(
        self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """FixMatch's terms, and two kinds of mixtures."""
        mixed_ll, mixed_lu, share_ll, share_lu, partners = outputs[-5:]
        labels, count = batch["labeled"]["label"], len(share_lu)
        pseudo_labels, weights = (part[:count] for part in targets)
        if self.mixture_threshold is not None:
            weak = outputs[2][:count] if self.labeler == "student" else self.teacher(batch["unlabeled"]["weak"][:count])
            weights = self.trusted(weak, weights, share_lu)
        classes = pseudo_labels if pseudo_labels.ndim == 1 else pseudo_labels.argmax(dim=1)
        loss_ll = self.mixture_loss(mixed_ll, labels, labels[partners], share_ll, both=True)
        loss_lu = self.mixture_loss(mixed_lu, labels[:count], classes, share_lu, both=self.decoupled == "both")
        ramped = self.mixed_unlabeled_weight * (1.0 - cosine_decay(self.progress))
        return {
            **super().losses(batch, outputs, targets),
            "mixed_labeled": self.mixed_labeled_weight * loss_ll.mean(),
            "mixed_unlabeled": ramped * (weights * loss_lu).mean(),
        }

    def trusted(self, weak: Tensor, weights: Tensor, share: Tensor) -> Tensor:
        """Which pseudo-labels count in a mixture, v (B,), from the weak logits (B, C) and the policy's weights (B,)."""
        cutoff = (1 - share).clamp(min=self.mixture_threshold)
        return torch.maximum(weights, (weak.float().softmax(dim=1).amax(dim=1) >= cutoff).to(weights.dtype))
