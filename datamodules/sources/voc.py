"""Folders laid out like PASCAL VOC: photographs, image tags, masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self
from xml.etree import ElementTree

import torch
from torch import Tensor

from datamodules.sources.base import FileSamples, MissingData, Samples, Source
from datamodules.sources.digit_scenes import tags_of
from zoo.core.errors import UserError, suggest

_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
)


class MaskedFiles(FileSamples):
    """Images with masks, read from files when asked for, both cut to the same middle square.

    Args:
        paths: N image files.
        labels: (N,).
        size: height and width of what is handed over.
        channels: 3 (colour) or 1 (grey).
        ids: stable numbers.
        columns: further tensors of length N.
        masks: N mask files of pixel classes (palette or grey PNG); without them samples carry no ``mask``.

    Raises:
        ValueError: on reading, when a file is no readable image; the message names the file.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        size: int,
        channels: int = 3,
        ids: Tensor | None = None,
        columns: dict[str, Tensor] | None = None,
        masks: Sequence[str] | None = None,
    ) -> None:
        super().__init__(paths, labels, size, channels, ids, columns)
        self.masks = None if masks is None else list(masks)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        batch = super().__getitem__(indices)
        if self.masks is not None:
            read = [read_mask(self.masks[i], self.size) for i in torch.as_tensor(indices, dtype=torch.int64).tolist()]
            batch["mask"] = torch.stack(read) if read else torch.empty(0, self.size, self.size, dtype=torch.uint8)
        return batch

    def _select(self, where: Tensor) -> dict[str, Any]:
        masks = None if self.masks is None else [self.masks[i] for i in where.tolist()]
        return {**super()._select(where), "masks": masks}

    def without_masks(self) -> Self:
        """The same samples for training from tags: no mask file is opened."""
        chosen = {**self._select(torch.arange(len(self))), "masks": None}
        return type(self)(**chosen, labels=self.labels, ids=self.ids, columns=self.columns)


def read_mask(path: str | Path, size: int | None = None) -> Tensor:
    """Pixel classes of a palette or grey PNG, uint8 (H, W), or its middle square resized to (size, size), nearest one.

    Raises:
        ValueError: when the file is missing, no readable image, or a colour image.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.load()
            mask: Any = opened.copy()
    except Exception as error:
        raise UserError(f"cannot read the mask {str(path)!r}: {error}") from error
    if mask.mode not in ("P", "L"):
        raise UserError(f"the mask {str(path)!r} has mode {mask.mode}, but pixel classes need a palette or grey image")
    if size is not None:
        short = min(mask.size)
        left, top = (mask.width - short) // 2, (mask.height - short) // 2
        mask = mask.resize((size, size), Image.Resampling.NEAREST, box=(left, top, left + short, top + short))
    return torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width)


class VOC(Source):
    """A folder laid out like PASCAL VOC 2012: JPEGImages, SegmentationClass, ImageSets/Segmentation, Annotations.

    Samples carry ``tags`` and, where masks are asked for, ``mask`` (0 background, class + 1, 255 border). Tags say what
    the whole image shows, whatever a crop leaves of it. With ``tags_from="annotations"`` training opens no mask, and
    ``SegmentationClass`` may lack those of the training images as long as none is held out for validation. Lines of a
    list are names with or without ending; of several columns the first counts.

    Args:
        root: the folder itself, or one above it (``root/VOC2012``, ``root/VOCdevkit/VOC2012``).
        size: height and width of the images handed over: the middle square, resized.
        train_list: name of the list of training images in ImageSets/Segmentation.
        test_list: name of the list of test images.
        mask_folder: folder of the masks, such as ``SegmentationClassAug``.
        tags_from: the objects in Annotations/NAME.xml, or the classes in the masks.
        classes: class names in the order of the masks' numbers from 1; VOC's twenty if not given.

    Raises:
        MissingData: when a folder, list or image is not there.
        ValueError: when an annotation names an unknown class.
    """

    channels = 3
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    flip = True
    streams = True

    def __init__(
        self,
        root: str = "data",
        size: int = 320,
        train_list: str = "train",
        test_list: str = "val",
        mask_folder: str = "SegmentationClass",
        tags_from: Literal["annotations", "masks"] = "annotations",
        classes: Sequence[str] | None = None,
    ) -> None:
        if size < 1:
            raise UserError(f"VOC: size={size} must be at least 1")
        self.root = root
        self.size = size
        self.train_list = train_list
        self.test_list = test_list
        self.mask_folder = mask_folder
        self.tags_from = tags_from
        self.classes = tuple(_CLASSES.split() if classes is None else classes)

    @property
    def folder(self) -> Path:
        """The folder that holds JPEGImages.

        Raises:
            MissingData: when there is none.
        """
        tried = [Path(self.root), Path(self.root) / "VOC2012", Path(self.root) / "VOCdevkit" / "VOC2012"]
        for folder in tried:
            if (folder / "JPEGImages").is_dir():
                return folder
        raise MissingData(
            f"VOC: root={self.root!r} ({Path(self.root).resolve()}) holds no JPEGImages, nor does VOC2012 or "
            "VOCdevkit/VOC2012 below it. torchvision.datasets.VOCSegmentation(root, download=True) brings VOC 2012"
        )

    def prepare(self) -> None:
        """Look for the folder and both lists."""
        for name in (self.train_list, self.test_list):
            self._names(name)

    def train(self) -> Samples:
        """The images of ``train_list``."""
        return self._samples(self.train_list)

    def test(self) -> Samples:
        """The images of ``test_list``."""
        return self._samples(self.test_list)

    def _names(self, listed: str) -> list[str]:
        path = self.folder / "ImageSets" / "Segmentation" / f"{listed}.txt"
        if not path.is_file():
            others = [other.stem for other in path.parent.glob("*.txt")]
            raise MissingData(f"VOC: there is no list {str(path)!r}.{suggest(listed, others)}")
        lines = path.read_text(encoding="utf-8").splitlines()
        names = [Path(line.split()[0]).stem for line in lines if line.strip()]
        for name in names:
            if not (self.folder / "JPEGImages" / f"{name}.jpg").is_file():
                raise MissingData(
                    f"VOC: {str(path)!r} lists {name!r}, but {self.folder / 'JPEGImages'} has no {name}.jpg"
                )
        return names

    def _samples(self, listed: str) -> Samples:
        names, folder = self._names(listed), self.folder
        masks = [folder / self.mask_folder / f"{name}.png" for name in names]
        if self.tags_from == "masks":
            rows = [tags_of(read_mask(mask)[None], self.num_classes)[0] for mask in masks]
        else:
            rows = [self._annotated(folder / "Annotations" / f"{name}.xml") for name in names]
        tags = torch.stack(rows) if rows else torch.zeros(0, self.num_classes)
        return MaskedFiles(
            [str(folder / "JPEGImages" / f"{name}.jpg") for name in names],
            torch.full((len(names),), -1),
            self.size,
            columns={"tags": tags},
            masks=[str(mask) for mask in masks],
        )

    def _annotated(self, path: Path) -> Tensor:
        if not path.is_file():
            raise MissingData(f"VOC: there is no annotation {str(path)!r}. tags_from: masks reads the tags from masks")
        tags = torch.zeros(self.num_classes)
        for entry in ElementTree.parse(path).getroot().iterfind("object/name"):
            name = (entry.text or "").strip()
            if name not in self.classes:
                raise UserError(f"VOC: {str(path)!r} names the class {name!r}.{suggest(name, self.classes)}")
            tags[self.classes.index(name)] = 1
        return tags
