"""Revisiting Consistency Regularization for Semi-Supervised Learning (CRMatch).

Fan, Kukleva and Schiele, GCPR 2021 and IJCV 2023, https://arxiv.org/abs/2112.05825
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_embedding_loss, cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.losses import quarter_turns
from zoo.semi_supervised.consistency import require_pixels
from zoo.semi_supervised.fixmatch import FixMatch


class CRMatch(FixMatch):
    r"""FixMatch whose features tell the strong view from the weak one, and rotations from each other.

    .. math:: L = L_{\mathrm{FixMatch}} + \lambda_d \tfrac1{\mu B} \sum_b w(q_b)
        \max\big(0, \cos(h(\phi(\alpha(u_b))), h(\phi(A(u_b))))\big)
        + \lambda_r \tfrac1{\mu B} \sum_b H(k_b, p_r(\phi(\mathrm{rot}_{k_b} \alpha(u_b))))

    The prediction must not change with the augmentation, but the features may: being equivariant they keep more of the
    image. :math:`h` is a linear map of its own, so that the distance does not act on the classifier's features
    directly, and :math:`p_r` has one hidden layer; both are gone after training.

    Here :math:`h` acts on pooled features; USB flattens the last map, which ties the network to one size of images. A
    quarter of the batch each is turned by 0, 90, 180 and 270 degrees, rather than all by all.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        distance_weight: :math:`\lambda_d` ≥ 0.
        rotation_weight: :math:`\lambda_r` ≥ 0; 0 for what has no upright, is not square, or has no pixels.
        **kwargs: ``policy`` and ``unlabeled_weight`` of :class:`~zoo.semi_supervised.fixmatch.FixMatch`, and those of
            its base.

    Raises:
        UserError: if a weight is negative; in training, to turn inputs that are not square images.

    Source: Fan et al. 2021, arXiv 2112.05825, section 3.
    """

    card = Card(
        title="Revisiting Consistency Regularization for Semi-Supervised Learning",
        year=2021,
        paper="arXiv:2112.05825",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(self, distance_weight: float = 1.0, rotation_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if distance_weight < 0.0 or rotation_weight < 0.0:
            raise UserError(
                f"CRMatch: distance_weight={distance_weight} and rotation_weight={rotation_weight} must not be negative"
            )
        self.distance_weight, self.rotation_weight = distance_weight, rotation_weight

    def build(self) -> None:
        """The networks, the policy, the map of the distance and the head that tells rotations."""
        super().build()
        width = self.network.num_features
        with torch.random.fork_rng(devices=[]):  # what is random afterwards does not depend on the heads
            self.distance_map = nn.Linear(width, width)
            if self.rotation_weight:
                self.rotation_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """FixMatch on features, their distance and their rotation."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        views, turns = [labeled["image"], unlabeled["strong"], unlabeled["weak"]], None
        if self.rotation_weight:
            require_pixels(self, unlabeled["weak"])
            turned, turns = quarter_turns(unlabeled["weak"])
            views.append(turned)
        x, strong, weak, *rotated = self.together(views, call=self.network.features)
        logits, strong_logits = self.network.logits(torch.cat([x, strong])).split([len(x), len(strong)])
        with torch.no_grad():
            weak_logits = self.network.logits(weak)
        targets, weights = self.policy(weak_logits, **self.evidence(batch, logits))
        self.watch(unlabeled, targets, weights)

        apart = torch.full_like(weights, -1.0)
        maps = self.distance_map(weak).float(), self.distance_map(strong).float()
        distance = cosine_embedding_loss(*maps, apart, reduction="none")
        unsupervised = weights * cross_entropy(strong_logits, targets, reduction="none")
        terms = {
            "supervised": self.criterion(logits, labeled["label"]),
            "unlabeled": self.unlabeled_weight * unsupervised.mean(),
            "distance": self.distance_weight * (weights * distance).mean(),
        }
        if turns is not None:
            terms["rotation"] = self.rotation_weight * cross_entropy(self.rotation_head(rotated[0]), turns)
        return self.report(**terms)
