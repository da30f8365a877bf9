"""ShrinkMatch on top of SimMatch, as its authors train on ImageNet.

Yang et al., ICCV 2023, https://arxiv.org/abs/2308.06777
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.heads import Head
from zoo.losses.shrink import shrink_loss, shrunk_space
from zoo.semi_supervised.shrinkmatch import AuxiliaryHead, MovingShare
from zoo.semi_supervised.simmatch import SimMatch


def plain_auxiliary_head(in_features: int, num_outputs: int) -> Head:
    """The auxiliary head of the code for ImageNet: its ReLUs do not leak."""
    return AuxiliaryHead(in_features, num_outputs, slope=0.0)


class ShrinkSimMatch(SimMatch):
    r"""SimMatch whose uncertain samples become certain in a smaller class space.

    .. math:: L = L_{\text{SimMatch}} + \lambda_u \bar r \tfrac1{\mu B} \sum_b
        \mathbb 1[\max \tilde p_b < \tau]\, \hat p_b\, H_{S_b}(\hat y_b, z(A(u_b)))

    :math:`\tilde p` are SimMatch's targets, smoothed by the similarities, :math:`\hat p` and :math:`\hat y` the largest
    of them and its class; the rest as in :class:`~zoo.semi_supervised.shrinkmatch.ShrinkMatch`.

    The defaults of SimMatch stay; the released ImageNet code sets ``threshold=0.7``, ``labeler="teacher"``,
    ``bank_momentum=0``, ``unlabeled_weight=10``, ``instance_weight=5`` and a queue of 256 batches in the alignment, and
    keeps :math:`\bar r` from epoch to epoch.

    Batch: ``labeled`` {image, label, index}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        auxiliary: from the number of features and of classes to the auxiliary head.
        ratio_momentum: of :math:`\bar r`, in [0, 1].
        **kwargs: see :class:`~zoo.semi_supervised.simmatch.SimMatch`.

    Raises:
        UserError: if an argument is out of its range; for fewer than three classes, of which none could be removed.

    Source: Yang et al. 2023, arXiv 2308.06777, section 3 and its code for ImageNet.
    """

    card = Card(
        title="Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning (on SimMatch)",
        year=2023,
        paper="arXiv:2308.06777",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self,
        auxiliary: Callable[[int, int], Head] = plain_auxiliary_head,
        ratio_momentum: float = 0.999,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.num_classes < 3:
            raise UserError(
                f"ShrinkSimMatch: num_classes={self.num_classes} must be at least 3: none of two can be removed"
            )
        if self.threshold == 0.0:
            raise UserError("ShrinkSimMatch: threshold=0.0 must lie in (0, 1]")
        if not 0.0 <= ratio_momentum <= 1.0:
            raise UserError(f"ShrinkSimMatch: ratio_momentum={ratio_momentum} must lie in [0, 1]")
        self.auxiliary_recipe, self.ratio_momentum = auxiliary, ratio_momentum

    def build(self) -> None:
        """SimMatch's parts, the auxiliary head, and the share of certain samples."""
        super().build()
        self.auxiliary = self.auxiliary_recipe(self.network.num_features, self.num_classes)
        self.certain_ratio = MovingShare(self.ratio_momentum)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """As SimMatch, and the uncertain samples among the classes that stay."""
        terms, strong, targets = self.terms(batch)
        confidence = targets.amax(dim=1)
        uncertain = (confidence < self.threshold).to(confidence.dtype)
        ratio = self.certain_ratio(1 - uncertain)
        shrunk = uncertain * confidence * shrink_loss(self.auxiliary(strong), *shrunk_space(targets, self.threshold))
        return self.report(**terms, shrunk=self.unlabeled_weight * ratio * shrunk.mean())
