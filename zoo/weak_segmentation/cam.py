"""CAM: Learning Deep Features for Discriminative Localization.

Zhou et al., CVPR 2016, https://arxiv.org/abs/1512.04150
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import multilabel_soft_margin_loss
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAveragePrecision, MulticlassJaccardIndex, MultilabelAveragePrecision

from zoo.core.card import Card
from zoo.core.method import Method
from zoo.weak_segmentation.maps import UNLABELED, class_activation_maps, multi_scale_maps, normalize_maps, pseudo_labels
from zoo.weak_segmentation.par import pixel_adaptive_refinement


class CAM(Method):
    r"""Masks from image tags: a tag classifier shows where it looks, and the maps spread along like pixels.

    .. math:: L = -\tfrac1C \sum_c y_c \log \sigma(z_c) + (1 - y_c) \log(1 - \sigma(z_c)), \quad
        M_c(p) = w_c^\top F(p), \quad \hat y(p) = \arg\max\{b, \tilde M_1(p), \dots, \tilde M_C(p)\}

    F are the features before global averaging, :math:`w` the linear head, :math:`\tilde M` the positive part scaled to
    [0, 1] in every image, zero for absent tags, and refined by PAR. Followed exactly: Zhou et al. 2016 for the maps
    (global averaging, bias left out); Ru et al. 2023 (ToCo) for the loss, the sum over scales, the scaling to [0, 1],
    PAR and the thresholds. Other than in ToCo, PAR refines the scores without a softmax over the classes and at full
    resolution, on the image as the network sees it (its weights do not depend on a channel's mean or deviation), and
    there is no segmentation network.

    Batch: ``weak`` {image, tags}. Evaluation {image, tags, mask}: the masks are measured given the image's tags, as is
    usual for pseudo-labels, and ``miou_untagged`` with the tags that the classifier finds by itself.

    Args:
        threshold: b in [0, 1], below which a pixel is background.
        confident: l and h: pseudo-labels leave out (255) pixels whose best score lies between.
        scales: of the image at which maps are computed.
        flip: look at the mirrored image as well; not for digits.
        dilations: distances of PAR's neighbours in pixels.
        iterations: of PAR; 0 leaves the maps as they are.
        position_weight: of PAR's position term.
        **kwargs: see :class:`~zoo.core.method.Method`. The head must be linear on averaged features.

    Source: Zhou et al. 2016, arXiv 1512.04150; Ru et al. 2023, arXiv 2303.01267; PAR first in Ru et al. 2022,
    arXiv 2203.02664.
    """

    card = Card(
        title="Learning Deep Features for Discriminative Localization",
        year=2016,
        paper="arXiv:1512.04150",
        family="weak_segmentation",
        roles=("weak",),
    )

    def __init__(
        self,
        threshold: float = 0.5,
        confident: tuple[float, float] = (0.25, 0.7),
        scales: Sequence[float] = (0.75, 1.0, 1.25),
        flip: bool = False,
        dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
        iterations: int = 10,
        position_weight: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= confident[0] <= confident[1] <= 1:
            raise ValueError(f"CAM: confident={tuple(confident)} must be an increasing range within [0, 1]")
        if not 0 <= threshold <= 1:
            raise ValueError(f"CAM: threshold={threshold} must be in [0, 1]")
        self.threshold, self.confident = threshold, confident
        self.scales, self.flip = scales, flip
        self.dilations, self.iterations, self.position_weight = dilations, iterations, position_weight

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Classify the tags."""
        weak = batch["weak"]
        return self.report(tags=multilabel_soft_margin_loss(self.network(weak["image"]), weak["tags"]))

    # --- masks --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def seeds(self, image: Tensor) -> Tensor:
        """Activation maps (B, C, H, W), not negative and of any size, before tags are known."""
        network: Any = getattr(self.predictor, "module", self.predictor)
        weight = getattr(network.head, "weight", None)
        if not isinstance(weight, Tensor) or not isinstance(network.head, nn.Linear):
            raise TypeError(f"CAM: the head is {type(network.head).__name__}, but maps are defined for a linear one")
        return multi_scale_maps(
            lambda x: class_activation_maps(network.dense(x).float(), weight.float()), image, self.scales, self.flip
        )

    def refine(self, maps: Tensor, image: Tensor, tags: Tensor) -> Tensor:
        """PAR, scaled so that a constant keeps its value and thresholds their meaning."""
        refined = pixel_adaptive_refinement(
            maps, image.float(), self.dilations, self.iterations, self.position_weight, present=tags > 0
        )
        return refined / (1 + self.position_weight) ** self.iterations

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def build_metrics(self) -> MetricCollection:
        """Mean IoU over background and classes of seeds and refined masks, and mean average precision of the tags."""
        names = ("miou_seed", "miou_refined", "miou_untagged")
        metrics: dict[str, Metric | MetricCollection] = {
            name: MulticlassJaccardIndex(self.num_classes + 1, ignore_index=UNLABELED) for name in names
        }
        several = self.num_classes > 1
        metrics["tag_map"] = MultilabelAveragePrecision(self.num_classes) if several else BinaryAveragePrecision()
        return MetricCollection(metrics, compute_groups=False)

    def evaluate(self, batch: Any, metrics: MetricCollection) -> None:
        """Compare masks with the truth."""
        image, tags, mask = batch["image"], batch["tags"], batch["mask"]
        logits = self(image)
        maps, found = normalize_maps(self.seeds(image)), found_tags(logits)
        refined = self.refine(maps, image, tags + found)  # planes refine independently: once for both kinds of tags
        for name, scores, shown in (
            ("miou_seed", maps, tags),
            ("miou_refined", refined, tags),
            ("miou_untagged", refined, found),
        ):
            metrics[name].update(pseudo_labels(scores * shown[:, :, None, None], self.threshold), mask)
        metrics["tag_map"].update(logits, tags.long())

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Masks (B, H, W) and pseudo-labels with 255 where unsure, of the batch's ``tags`` or else of those found.

        Returns:
            index (B,), tag probabilities (B, C), mask (B, H, W) and pseudo_label (B, H, W).
        """
        logits = self(batch["image"])
        tags = batch["tags"] if "tags" in batch else found_tags(logits)
        scores = self.refine(normalize_maps(self.seeds(batch["image"]), tags), batch["image"], tags)
        return {
            "index": batch["index"],
            "probabilities": logits.float().sigmoid(),
            "mask": pseudo_labels(scores, self.threshold),
            "pseudo_label": pseudo_labels(scores, *self.confident),
        }


def found_tags(logits: Tensor) -> Tensor:
    """Tags that are more likely than not, multi-hot (B, C)."""
    return (logits > 0).float()
