"""Image tags for training, masks for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.base import VAL, Data, Role, seeded
from datamodules.sources.base import Samples, Source
from datamodules.splits import Split, generator
from zoo.core.errors import UserError

UNLABELED = 255


class PairView(nn.Module):
    """The same scaling, shift and mirror for an image and its mask; every sample has its own draw.

    The image is interpolated and repeats its border; the mask takes the nearest pixel and is 255 outside.

    Args:
        shift: largest shift in each direction, as a share of the side, in [0, 1].
        scale: range of the enlargement.
        flip: mirror half of the samples.

    Raises:
        ValueError: when a number is out of range.
    """

    def __init__(self, shift: float = 0.125, scale: tuple[float, float] = (1.0, 1.0), flip: bool = False) -> None:
        super().__init__()
        if not 0 <= shift <= 1:
            raise UserError(f"PairView: shift={shift} must be in [0, 1]")
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"PairView: scale={tuple(scale)} must be an increasing range above 0")
        self.shift = shift
        self.scale = (float(scale[0]), float(scale[1]))
        self.flip = flip

    def forward(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Images uint8 (B, C, H, W) and masks (B, H, W) to views of the same shapes and types."""
        count, _, height, width = image.shape
        # drawn on the host in whole pixels, so that a shift alone moves pixels and does not blur them
        low, high = self.scale
        zoom = low + (high - low) * torch.rand(count)
        mirrored = torch.where(torch.rand(count) < 0.5, -1.0, 1.0) if self.flip else torch.ones(count)
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = mirrored / zoom
        theta[:, 1, 1] = 1 / zoom
        for axis, side in ((0, width), (1, height)):
            reach = int(self.shift * side)
            theta[:, axis, 2] = torch.randint(-reach, reach + 1, (count,)) * (2 / side)
        theta = theta.to(image.device, non_blocking=True)
        grid = F.affine_grid(theta, [count, 1, height, width], align_corners=False)
        moved = F.grid_sample(image.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        moved = moved.round().clamp(0, 255).to(torch.uint8)
        if mask is None:
            return moved, None
        inverted = UNLABELED - mask.float()[:, None]  # what lies outside is sampled as 0, and so becomes 255
        sampled = F.grid_sample(inverted, grid, mode="nearest", padding_mode="zeros", align_corners=False)[:, 0]
        return moved, (UNLABELED - sampled).to(mask.dtype)


class SegmentationData(Data):
    """Images that say which classes they show (``tags``), and masks that only an evaluation sees.

    The source's samples carry the columns ``tags`` (C,) and ``mask`` (H, W): 0 is background, c + 1 class c, 255 not
    labelled. ``num_classes`` counts the tags, without the background.

    Batch: ``weak`` {image, tags, index, hidden_mask}; ``hidden_mask`` is the truth for watching the training, left out
    for sources that read files. Evaluation: {image, tags, mask, index, label}; ``label`` is -1.

    Args:
        source: a source whose samples have tags and masks, such as :class:`DigitScenes`.
        batch_size: images per process and step.
        steps: optimizer steps of an epoch.
        eval_batch_size: images per process and step in validation, test and prediction.
        val_size: training images held out for validation: a number, or a share of the training set.
        view: what training sees; by default a shift by an eighth, with a mirror where the source allows.
        num_workers: processes that read ahead; 0 is fastest for sources in memory.
        seed: of splits, orders and views.
        split: a split.json of an earlier run, to use the same samples.
        allow_repeats: accept a training set smaller than a batch.
        predict_folder: predict on all images below this folder instead of the test set.
        pin_memory: page-locked batches, with workers and a GPU.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 50,
        steps: int = 100,
        eval_batch_size: int = 100,
        val_size: int | float = 0.1,
        view: PairView | None = None,
        num_workers: int = 0,
        seed: int = 0,
        split: str | None = None,
        allow_repeats: bool = False,
        predict_folder: str | None = None,
        pin_memory: bool = True,
    ) -> None:
        super().__init__(
            source,
            batch_size,
            steps,
            eval_batch_size,
            val_size,
            num_workers=num_workers,
            seed=seed,
            split=split,
            allow_repeats=allow_repeats,
            views_in_workers=False,  # image and mask move together, so both are needed at once: on the device
            predict_folder=predict_folder,
            pin_memory=pin_memory,
        )
        self.view = PairView(flip=source.flip) if view is None else view

    def make_split(self, labels: Tensor) -> Split:
        """Hold out at random: an image with several tags has no one class to stratify by."""
        total = self.val_size if isinstance(self.val_size, int) else round(self.val_size * len(labels))
        if total >= len(labels):
            raise UserError(f"{self._owner}: val_size={self.val_size} leaves nothing of {len(labels)} images")
        order = torch.randperm(len(labels), generator=generator(self.seed, VAL))
        parts = {"weak": order[total:].sort().values, "val": order[:total].sort().values}
        return Split(parts, len(labels), self.seed, self.source.name)

    def make_roles(self) -> dict[str, Role]:
        """One role: ``weak``."""
        samples = self._train(self.source).subset(self.parts["weak"])
        hide = getattr(samples, "without_masks", None)  # files: what training must not see is not even opened
        return {"weak": Role(samples if hide is None else hide(), self.batch_size, {})}

    def _load(self, source: Source, part: str) -> Samples:
        samples = super()._load(source, part)
        if "tags" not in samples.columns:
            raise UserError(
                f"{self._owner}: source={source.name} has no tags. Sources with tags and masks: DigitScenes, VOC"
            )
        return samples

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the device: shifted pairs for training, normalised images, masks as int64."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if isinstance(batch.get("mask"), Tensor):
            batch["mask"] = batch["mask"].long()
        return batch

    def _finish(self, role: Role, raw: dict[str, Any]) -> dict[str, Tensor]:
        with seeded(raw.get("seed", 0)), torch.no_grad():
            image, mask = self.view(raw["image"], raw.get("mask"))
        made = {"image": self._as_floats(image), "tags": raw["tags"], "index": raw["index"]}
        return made if mask is None else {**made, "hidden_mask": mask.long()}
