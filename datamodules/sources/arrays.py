"""Images that are already tensors: in Python, or in an .npz, .pt or .safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.sources.base import MissingData, Samples, Source, TensorSamples, holdout
from datamodules.splits import counts, proportional
from zoo.core.errors import UserError


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"ArraySource: {name} are not numbers of one shape; images of mixed size go into a folder "
            f"of files ({error})"
        ) from error


class ArraySource(Source):
    """Tensors ``images`` (N, C, H, W), (N, H, W, C) or (N, H, W) uint8 and ``labels`` (N,).

    A file may also hold ``test_images``, ``test_labels`` and ``unlabeled_images``. Without a test part a stratified
    share, drawn by ``seed``, is held out.

    Args:
        num_classes: number of classes.
        path: an .npz, .pt or .safetensors file with these names; not needed when the tensors are given.
        images: tensor or array, instead of a file.
        labels: tensor or array.
        test_images: tensor or array.
        test_labels: tensor or array.
        size: height and width of the images.
        channels: 1 or 3.
        classes: names; numbers if not given.
        mean: per channel in 0..1.
        std: per channel.
        flip: whether mirrored images still show their class.
        test_fraction: share held out where there is no test part.
        seed: of that split.
    """

    def __init__(
        self,
        num_classes: int,
        path: str | None = None,
        images: Any = None,
        labels: Any = None,
        test_images: Any = None,
        test_labels: Any = None,
        size: int = 28,
        channels: int = 1,
        classes: tuple[str, ...] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        flip: bool = True,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        if (path is None) == (images is None):
            raise UserError("ArraySource: give either path or images and labels")
        if classes is not None and len(classes) != num_classes:
            raise UserError(f"ArraySource: num_classes={num_classes}, but classes names {len(classes)}")
        if (images is None) != (labels is None) or (test_images is None) != (test_labels is None):
            raise UserError("ArraySource: images and labels come in pairs")
        self.path = path
        self.classes = tuple(classes) if classes else tuple(str(label) for label in range(num_classes))
        self.size = size
        self.channels = channels
        self.mean = tuple(mean) if mean else (0.5,) * channels
        self.std = tuple(std) if std else (0.25,) * channels
        self.flip = flip
        self.test_fraction = test_fraction
        self.seed = seed
        given = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
        self._given = None if path is not None else {k: _tensor(k, v) for k, v in given.items() if v is not None}

    def prepare(self) -> None:
        """Check that the file is there.

        Raises:
            MissingData: when it is not.
        """
        if self.path is not None and not Path(self.path).is_file():
            raise MissingData(
                f"ArraySource: there is no file {self.path!r} ({Path(self.path).resolve()}). Expected an .npz, .pt or "
                ".safetensors file with images (N, C, H, W) uint8 and labels (N,)"
            )

    def _read(self) -> dict[str, Tensor]:
        if self._given is None:
            self.prepare()
            assert self.path is not None  # one of the two is given: checked on construction
            suffix = Path(self.path).suffix.lower()
            if suffix == ".npz":
                import numpy as np

                with np.load(self.path) as arrays:  # allow_pickle stays off
                    try:
                        self._given = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
                    except (ValueError, TypeError) as error:  # arrays of objects, which only pickle could read
                        raise UserError(
                            f"ArraySource: {self.path} holds something else than arrays of numbers of one shape; "
                            f"images of mixed size go into a folder of files ({error})"
                        ) from error
            elif suffix == ".safetensors":
                from safetensors.torch import load_file

                self._given = load_file(self.path)
            elif suffix in (".pt", ".pth"):
                self._given = torch.load(self.path, weights_only=True)
            else:
                raise UserError(f"ArraySource: path={self.path!r} must end in .npz, .pt or .safetensors")
            if not isinstance(self._given, dict) or not {"images", "labels"} <= set(self._given):
                found = ", ".join(self._given) if isinstance(self._given, dict) else type(self._given).__name__
                raise UserError(f"ArraySource: {self.path} holds {found}; images and labels are needed")
        return self._given

    def _samples(self, images: Tensor, labels: Tensor) -> TensorSamples:
        if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[-1] in (1, 3):
            images = images.permute(0, 3, 1, 2).contiguous()
        samples = TensorSamples(images, labels)
        expected = (self.channels, self.size, self.size)
        if tuple(samples.images.shape[1:]) != expected:
            raise UserError(
                f"ArraySource: images are {tuple(samples.images.shape[1:])}, "
                f"but channels={self.channels} and size={self.size} say {expected}"
            )
        counts(samples.labels, self.num_classes, "ArraySource")
        return samples

    def _parts(self) -> tuple[TensorSamples, TensorSamples]:
        tensors = self._read()
        whole = self._samples(tensors["images"], tensors["labels"])
        if "test_images" in tensors:
            return whole, self._samples(tensors["test_images"], tensors["test_labels"])
        available = counts(whole.labels, self.num_classes)
        wanted = proportional(available, round(self.test_fraction * len(whole)))
        rest, held = holdout(whole.labels, wanted, self.num_classes, self.seed)
        return (
            TensorSamples(whole.images[rest], whole.labels[rest]),
            TensorSamples(whole.images[held], whole.labels[held]),
        )

    def train(self) -> Samples:
        """The training samples, with labels."""
        return self._parts()[0]

    def test(self) -> Samples:
        """The test samples, with labels."""
        return self._parts()[1]

    def unlabeled(self) -> Samples | None:
        """What the source brings without labels, or None."""
        images = self._read().get("unlabeled_images")
        return None if images is None else self._samples(images, torch.full((len(images),), -1))
