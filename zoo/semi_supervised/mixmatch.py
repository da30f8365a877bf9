"""MixMatch: A Holistic Approach to Semi-Supervised Learning.

Berthelot et al., NeurIPS 2019, https://arxiv.org/abs/1905.02249
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.losses import mix, mixing_shares, sharpen, squared_error
from zoo.semi_supervised.consistency import Consistency, require_pixels


class MixMatch(Consistency):
    r"""Labels and sharpened guesses, mixed with each other.

    .. math:: L = \tfrac1B \sum_{x', p' \in X'} H(p', p(x')) + r(t)\, \lambda_u\, \tfrac1{C |U'|} \sum_{u', q' \in U'}
        \lVert q' - p(u') \rVert^2

    The guess :math:`q = \mathrm{sharpen}\big(\tfrac12 (p(\alpha_1(u)) + p(\alpha_2(u))), T\big)` goes with both views.
    Every sample is mixed with another one of all, labeled or not, as :math:`\lambda' x + (1 - \lambda') x_\sigma` with
    :math:`\lambda' = \max(\lambda, 1 - \lambda) \ge \tfrac12` drawn for every sample: the first B stay mostly labeled
    and are X', the others U'.

    The mixed samples go through the network in one batch, which is what the released code's interleaving of labeled and
    unlabeled samples comes close to; the guesses leave BatchNorm's running averages alone.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, weak_2, hidden_label (watched only)}.

    Args:
        temperature: T > 0.
        alpha: of the Beta distribution of λ, ≥ 0; 0 mixes nothing.
        unlabeled_weight: :math:`\lambda_u` ≥ 0: the paper's 75 for CIFAR-10, 150 for CIFAR-100, 250 for SVHN. With 0 it
            is mixup with unlabeled samples.
        ramp: share of training over which it grows, linearly: the paper's 16,000 of a million steps.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`; ``forward_pass`` must be ``"split"``.

    Raises:
        UserError: if an argument is out of its range; in training, for inputs that are not pixels.

    Source: Berthelot et al. 2019, arXiv 1905.02249, algorithm 1 and equations 3 to 11.
    """

    card = Card(
        title="MixMatch: A Holistic Approach to Semi-Supervised Learning",
        year=2019,
        paper="arXiv:1905.02249",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "weak_2")

    def __init__(
        self,
        temperature: float = 0.5,
        alpha: float = 0.75,
        unlabeled_weight: float = 75.0,
        ramp: float = 1 / 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(unlabeled_weight=unlabeled_weight, ramp=ramp, **kwargs)
        self.temperature, self.alpha = temperature, alpha
        if temperature <= 0.0 or alpha < 0.0:
            raise UserError(f"MixMatch: temperature={temperature} must be positive and alpha={alpha} not negative")
        if self.forward_pass != "split":
            raise UserError("MixMatch: forward_pass must be 'split', as what is mixed depends on the guesses")

    def guess(self, views: list[Tensor]) -> Tensor:
        """The views' mean prediction, sharpened: (μB, C), without a gradient."""
        with torch.no_grad(), frozen_batch_norm(self.network):
            predictions = self.network(torch.cat(views)).float().softmax(dim=1).chunk(len(views))
        return sharpen(torch.stack(predictions).mean(dim=0), self.temperature)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Guess, mix, and fit the mixture."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        views = [unlabeled["weak"], unlabeled["weak_2"]]
        require_pixels(self, labeled["image"], *views)
        guesses = self.guess(views)
        self.watch(unlabeled, guesses, torch.ones_like(guesses[:, 0]))

        labels = one_hot(labeled["label"], self.num_classes).to(guesses.dtype)
        x, targets = torch.cat([labeled["image"], *views]), torch.cat([labels, guesses, guesses])
        shares = mixing_shares(len(x), self.alpha).to(x.device, non_blocking=True)
        x, targets = mix(x, targets, shares, torch.randperm(len(x)).to(x.device, non_blocking=True))
        logits, first = self.network(x), len(labels)
        return self.report(
            supervised=self.criterion(logits[:first], targets[:first]),  # eq. 3
            unlabeled=self.ramped * self.unlabeled_weight * squared_error(logits[first:], targets[first:]),  # eq. 4
        )
