"""ReMixMatch: Semi-Supervised Learning with Distribution Alignment and Augmentation Anchoring.

Berthelot et al., ICLR 2020, https://arxiv.org/abs/1911.09785
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.criteria import class_counts
from zoo.core.errors import UserError
from zoo.losses import mix, mixing_shares, quarter_turns, sharpen
from zoo.policies import Alignment, QueueAlignment
from zoo.semi_supervised.consistency import Consistency, require_pixels


def last_batches(num_classes: int) -> Alignment:
    """The paper's alignment: by the mean prediction of the last 128 batches."""
    return QueueAlignment(num_classes, length=128)


class ReMixMatch(Consistency):
    r"""MixMatch whose guesses are aligned with the labels' frequencies and anchor several strong views.

    .. math:: L = \tfrac{1}{|X'|} \sum H(p', p(x')) + r \lambda_u \tfrac{1}{|U'|} \sum H(q', p(u'))
        + r \lambda_a \tfrac{1}{\mu B} \sum H(q, p(A_1(u)))
        + \lambda_r \tfrac{1}{\mu B} \sum H(k, p_r(\mathrm{rot}_k A_1(u)))

    The guess :math:`q = \mathrm{sharpen}(\mathrm{align}(p(\alpha(u))), T)` of the weak view is the target of this view
    and of K strong ones; :math:`X'` and :math:`U'` are strong labeled views and these K + 1, mixed as in
    :class:`~zoo.semi_supervised.mixmatch.MixMatch`. One strong view is also fitted unmixed, and turned by k quarters,
    which a head of its own has to tell. The mixed samples go through the network in one batch; what is unmixed leaves
    BatchNorm's running averages alone, as in the released code.

    Batch: ``labeled`` {strong, label}, ``unlabeled`` {weak, strong, ..., strong_K, hidden_label (watched only)}.

    Args:
        num_strong: K ≥ 1; the paper has 8, USB 2.
        alignment: from the number of classes to an :class:`~zoo.policies.Alignment`; if it has a prior, that becomes
            the labels' own frequencies.
        temperature: T > 0.
        alpha: of the Beta distribution of the mixing shares, ≥ 0; 0 mixes nothing.
        unlabeled_weight: :math:`\lambda_u` ≥ 0.
        anchor_weight: :math:`\lambda_a` ≥ 0, of the unmixed strong view.
        rotation_weight: :math:`\lambda_r` ≥ 0; 0 for what has no upright, or is not square.
        ramp: share of training over which the first two grow, linearly.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`; ``forward_pass`` must be ``"split"``.

    Raises:
        UserError: if an argument is out of its range; in training, for inputs that are not square images.

    Source: Berthelot et al. 2020, arXiv 1911.09785, algorithm 1 and section 3.
    """

    card = Card(
        title="ReMixMatch: Semi-Supervised Learning with Distribution Alignment and Augmentation Anchoring",
        year=2020,
        paper="arXiv:1911.09785",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    labeled_views: ClassVar[tuple[str, ...]] = ("strong",)

    def __init__(
        self,
        num_strong: int = 8,
        alignment: Callable[[int], Alignment] = last_batches,
        temperature: float = 0.5,
        alpha: float = 0.75,
        unlabeled_weight: float = 1.5,
        anchor_weight: float = 0.5,
        rotation_weight: float = 0.5,
        ramp: float = 1 / 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(unlabeled_weight=unlabeled_weight, ramp=ramp, **kwargs)
        if num_strong < 1 or temperature <= 0.0:
            raise UserError(f"ReMixMatch: num_strong={num_strong} and temperature={temperature} must be positive")
        for name, value in (("alpha", alpha), ("anchor_weight", anchor_weight), ("rotation_weight", rotation_weight)):
            if value < 0.0:
                raise UserError(f"ReMixMatch: {name}={value} must not be negative")
        if self.forward_pass != "split":
            raise UserError("ReMixMatch: forward_pass must be 'split', as what is mixed depends on the guesses")
        self.strong_views = ("strong", *(f"strong_{k}" for k in range(2, num_strong + 1)))
        self.unlabeled_views = ("weak", *self.strong_views)  # type: ignore[misc]
        self.alignment_recipe, self.temperature, self.alpha = alignment, temperature, alpha
        self.anchor_weight, self.rotation_weight = anchor_weight, rotation_weight

    def build(self) -> None:
        """The networks, the alignment, and the head that tells rotations."""
        super().build()
        self.alignment = self.alignment_recipe(self.num_classes)
        if self.rotation_weight:
            with torch.random.fork_rng(devices=[]):  # what is random afterwards does not depend on the head
                self.rotation_head = nn.Linear(self.network.num_features, 4)

    def prepare_for(self, data: Any) -> None:
        """Align with the frequencies of the labels."""
        super().prepare_for(data)
        counts, prior = class_counts(data, self.num_classes), getattr(self.alignment, "prior", None)
        if counts is not None and prior is not None:
            self.alignment.prior = (counts / counts.sum()).to(prior)

    def guess(self, batch: dict[str, dict[str, Tensor]]) -> Tensor:
        """Predictions for the weak view, aligned and sharpened: (μB, C), without a gradient."""
        with torch.no_grad(), frozen_batch_norm(self.network):
            p = self.network(batch["unlabeled"]["weak"]).float().softmax(dim=1)
        return sharpen(self.alignment(p, index=batch["unlabeled"].get("index")), self.temperature)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Guess, mix, fit the mixture, the anchored view and its rotation."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        views = [unlabeled["weak"], *(unlabeled[name] for name in self.strong_views)]
        require_pixels(self, labeled["strong"], *views)
        guesses, strong = self.guess(batch), views[1]
        self.watch(unlabeled, guesses, torch.ones_like(guesses[:, 0]))

        labels = one_hot(labeled["label"], self.num_classes).to(guesses.dtype)
        x, targets = torch.cat([labeled["strong"], *views]), torch.cat([labels, guesses.repeat(len(views), 1)])
        shares = mixing_shares(len(x), self.alpha).to(x.device, non_blocking=True)
        x, targets = mix(x, targets, shares, torch.randperm(len(x)).to(x.device, non_blocking=True))
        logits, first = self.network(x), len(labels)

        turned, turns = quarter_turns(strong) if self.rotation_weight else (strong[:0], None)
        with frozen_batch_norm(self.network):
            features = self.network.features(torch.cat([strong, turned]))
        ramped = self.ramped
        terms = {
            "supervised": self.criterion(logits[:first], targets[:first]),
            "unlabeled": ramped * self.unlabeled_weight * cross_entropy(logits[first:], targets[first:]),
            "anchor": ramped
            * self.anchor_weight
            * cross_entropy(self.network.logits(features[: len(strong)]), guesses),
        }
        if turns is not None:
            rotation = cross_entropy(self.rotation_head(features[len(strong) :]), turns)
            terms["rotation"] = self.rotation_weight * rotation
        return self.report(**terms)
