"""ShrinkMatch: Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning.

Yang et al., ICCV 2023, https://arxiv.org/abs/2308.06777
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.distributed import mean_across_ranks
from zoo.core.errors import UserError
from zoo.core.heads import Head
from zoo.losses.shrink import shrink_loss, shrunk_space
from zoo.policies.alignment import Alignment, QueueAlignment
from zoo.semi_supervised.base import SemiSupervised


class AuxiliaryHead(Head):
    """Two hidden layers a quarter as wide as the features, with BatchNorm and a leaky ReLU: the released code's.

    Args:
        in_features: D.
        num_outputs: C.
        slope: of the ReLU where it is negative: 0.1 in the code for CIFAR, 0 in that for ImageNet.
    """

    def __init__(self, in_features: int, num_outputs: int, slope: float = 0.1) -> None:
        super().__init__()
        width = max(in_features // 4, 1)
        self.layers = nn.Sequential(
            *(nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.LeakyReLU(slope)),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.LeakyReLU(slope)),
            nn.Linear(width, num_outputs),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        return self.layers(features)


class MovingShare(nn.Module):
    r"""The moving average :math:`\bar r` of a share, over all ranks; the first one seen is where it starts.

    Args:
        momentum: in [0, 1].
    """

    value: Tensor

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.tensor(-1.0))  # below 0: nothing seen

    def forward(self, certain: Tensor, anew: bool = False) -> Tensor:
        """The average with these samples (B,) of 0 and 1; ``anew`` forgets what was before. It moves in training."""
        if self.training:
            now = mean_across_ranks(certain.mean())
            before = self.value - 2 if anew else self.value
            self.value = torch.where(before < 0, now, torch.lerp(now, before, self.momentum))
        return self.value


class ShrinkMatch(SemiSupervised):
    r"""Uncertain samples become certain in a class space without the rivals of their first class.

    .. math:: L = L_x + \frac{\lambda}{\mu B} \sum_b \Big( \mathbb 1[\hat p_b \ge \tau]\, H(\tilde p_b, p(A(u_b)))
        + \bar r\, \mathbb 1[\hat p_b < \tau]\, \hat p_b\, H_{S_b}(\hat y_b, z(A(u_b))) \Big), \quad
        \tilde p_b = \mathrm{align}(p(\alpha(u_b)))

    :math:`\hat p` and :math:`\hat y` are the largest aligned probability and its class. :math:`S` is that class and
    those that remain when its closest rivals are removed, as few as needed for a confidence of :math:`\tau`
    (:func:`~zoo.losses.shrunk_space`); a sample for which no removal is enough costs nothing. :math:`H_S` is the
    cross-entropy among the classes of :math:`S` of an auxiliary head's logits :math:`z`, which only this term trains.
    Each uncertain sample weighs as much as its confidence, and all of them as much as :math:`\bar r`, the moving
    average of the share of certain samples, over all ranks; it starts at the first batch's share and moves before it
    is used.

    The paper's three code bases differ. The defaults follow its CIFAR code; its STL-10 and SVHN code is
    ``soft_targets=False, confidence_from="raw"`` with ``alignment=MovingAlignment``; its ImageNet code is
    :class:`~zoo.semi_supervised.shrink_simmatch.ShrinkSimMatch`. The CIFAR code forgets :math:`\bar r` at the beginning
    of every epoch (``reset_each_epoch=True``), and takes each process's own share.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        threshold: :math:`\tau` in (0, 1].
        alignment: from the number of classes to an :class:`~zoo.policies.alignment.Alignment`.
        soft_targets: certain samples learn :math:`\tilde p` rather than :math:`\hat y`.
        confidence_from: what the class space is searched with: ``"aligned"`` probabilities, or ``"raw"`` ones, whose
            first class may be another.
        auxiliary: from the number of features and of classes to the auxiliary head.
        ratio_momentum: of :math:`\bar r`, in [0, 1].
        reset_each_epoch: whether :math:`\bar r` starts anew with every epoch.
        unlabeled_weight: :math:`\lambda` ≥ 0.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Raises:
        UserError: if an argument is out of its range; for fewer than three classes, of which none could be removed.

    Source: Yang et al. 2023, arXiv 2308.06777, section 3.
    """

    card = Card(
        title="Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning",
        year=2023,
        paper="arXiv:2308.06777",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self,
        threshold: float = 0.95,
        alignment: Callable[[int], Alignment] = QueueAlignment,
        soft_targets: bool = True,
        confidence_from: Literal["aligned", "raw"] = "aligned",
        auxiliary: Callable[[int, int], Head] = AuxiliaryHead,
        ratio_momentum: float = 0.999,
        reset_each_epoch: bool = False,
        unlabeled_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.num_classes < 3:
            raise UserError(
                f"ShrinkMatch: num_classes={self.num_classes} must be at least 3: none of two can be removed"
            )
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"ShrinkMatch: threshold={threshold} must lie in (0, 1]")
        if confidence_from not in ("aligned", "raw"):
            raise UserError(f"ShrinkMatch: confidence_from={confidence_from!r} must be 'aligned' or 'raw'")
        if not 0.0 <= ratio_momentum <= 1.0:
            raise UserError(f"ShrinkMatch: ratio_momentum={ratio_momentum} must lie in [0, 1]")
        if unlabeled_weight < 0.0:
            raise UserError(f"ShrinkMatch: unlabeled_weight={unlabeled_weight} must not be negative")
        self.threshold, self.alignment_recipe, self.soft_targets = threshold, alignment, soft_targets
        self.confidence_from, self.auxiliary_recipe = confidence_from, auxiliary
        self.ratio_momentum, self.reset_each_epoch = ratio_momentum, reset_each_epoch
        self.unlabeled_weight = unlabeled_weight

    def build(self) -> None:
        """The networks, the auxiliary head and what moves."""
        super().build()
        self.auxiliary = self.auxiliary_recipe(self.network.num_features, self.num_classes)
        self.alignment = self.alignment_recipe(self.num_classes)
        self.certain_ratio = MovingShare(self.ratio_momentum)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels, the certain targets, and the uncertain ones among the classes that stay."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        learning = [labeled["image"], unlabeled["strong"]]
        features, strong, weak = self.together(learning, [unlabeled["weak"]], self.network.features)
        logits = self.network.logits(features)
        raw = self.network.logits(weak).detach().float().softmax(dim=1)
        aligned = self.alignment(raw, **self.evidence(batch, logits))
        confidence, label = aligned.max(dim=1)
        certain = (confidence >= self.threshold).to(confidence.dtype)
        self.watch(unlabeled, label, certain)

        targets = aligned if self.soft_targets else label
        fitted = cross_entropy(self.network.logits(strong), targets, reduction="none")
        space = shrunk_space(aligned if self.confidence_from == "aligned" else raw, self.threshold)
        shrunk = confidence * shrink_loss(self.auxiliary(strong), *space)
        ratio = self.certain_ratio(certain, anew=self.reset_each_epoch and batch_idx == 0)
        if self.logs_now:  # how many samples are used as well, in a space of their own
            in_use = (1 - certain) * (space[1].sum(dim=1) > 1)
            self.observe(certain_ratio=ratio, shrunk_ratio=in_use.mean())
        return self.report(
            supervised=self.criterion(logits, labeled["label"]),
            unlabeled=self.unlabeled_weight * (certain * fitted).mean(),
            shrunk=self.unlabeled_weight * ratio * ((1 - certain) * shrunk).mean(),
        )
