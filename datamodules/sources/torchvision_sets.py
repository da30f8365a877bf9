"""The usual benchmark sets, in the layouts that torchvision downloads and reads."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import torch

from datamodules.sources.base import MissingData, Samples, Source, TensorSamples
from zoo.core.errors import UserError

_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
    pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
    seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
    tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
    worm
"""


class _TorchvisionSource(Source):
    """A set that torchvision knows, in memory as uint8.

    Args:
        root: folder of all data sets.
        download: fetch the set when it is not there.
    """

    folder: str = ""  # what torchvision makes below root
    files: tuple[str, ...] = ()  # for messages: one that must be there

    def __init__(self, root: str = "data", download: bool = True) -> None:
        self.root = root
        self.download = download

    def _open(self, split: str, download: bool = False) -> Any:
        raise NotImplementedError

    def _tensors(self, dataset: Any) -> tuple[Any, Any]:
        return dataset.data, dataset.targets

    def prepare(self) -> None:
        """Check that the files are there, or download them.

        Raises:
            MissingData: when they are not there and could not be downloaded.
        """
        for split in ("train", "test"):
            try:
                self._open(split)
            except (RuntimeError, OSError):
                self._fetch(split)

    def _fetch(self, split: str) -> None:
        reason = "download is off"
        if self.download:
            try:
                self._open(split, download=True)
            except Exception as error:  # whatever the network, a proxy or the disk raise
                reason = f"the download failed ({type(error).__name__}: {error})"
            else:
                return
        raise self._missing(reason)

    def _missing(self, reason: str) -> MissingData:
        here = (Path(self.root) / self.folder).resolve()
        return MissingData(
            f"{self.name}: looked for {', '.join(self.files)} in {here}, and {reason}. "
            f"With a network, root={self.root!r} and download=true fetch it; without one, copy the files there."
        )

    def _samples(self, split: str) -> Samples:
        try:
            dataset = self._open(split)
        except (RuntimeError, OSError) as error:
            raise self._missing(f"found nothing usable ({error})") from error
        images, labels = self._tensors(dataset)
        images = torch.as_tensor(images)
        if images.ndim == 4 and images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2).contiguous()
        return TensorSamples(images, torch.as_tensor(labels).long())

    def train(self) -> Samples:
        """The training samples, with labels."""
        return self._samples("train")

    def test(self) -> Samples:
        """The test samples, with labels."""
        return self._samples("test")


class _PackedSource(_TorchvisionSource):
    """One whose folder may also hold the packed ``*.gz`` files, which are unpacked there."""

    files: tuple[str, ...] = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    def prepare(self) -> None:
        """Check that the files are there, or bring them."""
        raw = Path(self.root) / self.folder
        for name in self.files:
            packed, plain = raw / f"{name}.gz", raw / name
            if packed.is_file() and not plain.is_file():
                partial = plain.with_name(f"{name}.partial")  # an interrupted run leaves no half file under the name
                with gzip.open(packed, "rb") as read, partial.open("wb") as write:
                    shutil.copyfileobj(read, write)
                partial.replace(plain)
        super().prepare()


class MNIST(_PackedSource):
    """MNIST: 60,000 + 10,000 handwritten digits, grey, 28 × 28.

    ``ROOT/MNIST/raw`` may also hold the packed ``*.gz`` files: they are unpacked there.

    Args:
        root: folder of all data sets.
        download: fetch the set when it is not there.
    """

    classes = tuple(str(digit) for digit in range(10))
    channels = 1
    size = 28
    mean = (0.1307,)
    std = (0.3081,)
    flip = False
    folder = "MNIST/raw"

    def _open(self, split: str, download: bool = False) -> Any:
        from torchvision import datasets

        return datasets.MNIST(self.root, train=split == "train", download=download)


class USPS(_TorchvisionSource):
    """USPS: 7,291 + 2,007 handwritten digits of envelopes, grey, 16 × 16; ``ROOT/usps.bz2`` and ``ROOT/usps.t.bz2``.

    Args:
        root: folder of all data sets.
        download: fetch the set when it is not there.
    """

    classes = tuple(str(digit) for digit in range(10))
    channels = 1
    size = 16
    # Of the training pixels in 0..1, as several public users of torchvision's USPS normalise it; not computed here.
    mean = (0.2469,)
    std = (0.2989,)
    flip = False
    files = ("usps.bz2", "usps.t.bz2")

    def _open(self, split: str, download: bool = False) -> Any:
        from torchvision import datasets

        return datasets.USPS(self.root, train=split == "train", download=download)


class FashionMNIST(_PackedSource):
    """Fashion-MNIST: 60,000 + 10,000 grey photographs of clothing, 28 × 28.

    ``ROOT/FashionMNIST/raw`` may also hold the packed ``*.gz`` files (the Debian package ``dataset-fashion-mnist``
    brings them): they are unpacked there.

    Args:
        root: folder of all data sets.
        download: fetch the set when it is not there.
    """

    classes = (
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    )
    channels = 1
    size = 28
    mean = (0.2860,)
    std = (0.3530,)
    folder = "FashionMNIST/raw"

    def _open(self, split: str, download: bool = False) -> Any:
        from torchvision import datasets

        return datasets.FashionMNIST(self.root, train=split == "train", download=download)


class CIFAR10(_TorchvisionSource):
    """CIFAR-10: 50,000 + 10,000 colour photographs, 32 × 32.

    Args:
        root: folder of all data sets.
        download: fetch the set when it is not there.
    """

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    folder = "cifar-10-batches-py"
    files = ("data_batch_1 ... data_batch_5", "test_batch", "batches.meta")

    def _open(self, split: str, download: bool = False) -> Any:
        from torchvision import datasets

        return datasets.CIFAR10(self.root, train=split == "train", download=download)


class CIFAR100(_TorchvisionSource):
    """CIFAR-100: 50,000 + 10,000 colour photographs of 100 classes, 32 × 32.

    Args:
        root: folder of all data sets.
        download: fetch the set when it is not there.
    """

    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    folder = "cifar-100-python"
    files = ("train", "test", "meta")
    classes = tuple(_CIFAR100.split())

    def _open(self, split: str, download: bool = False) -> Any:
        from torchvision import datasets

        return datasets.CIFAR100(self.root, train=split == "train", download=download)


class SVHN(_TorchvisionSource):
    """SVHN, cropped digits: 73,257 + 26,032 colour photographs of house numbers, 32 × 32.

    Args:
        root: folder of all data sets.
        download: fetch the set when it is not there.
        extra: bring the 531,131 further, easier digits as unlabelled samples.
    """

    classes = tuple(str(digit) for digit in range(10))
    mean = (0.4377, 0.4438, 0.4728)
    std = (0.1980, 0.2010, 0.1970)
    flip = False
    files = ("train_32x32.mat", "test_32x32.mat")

    def __init__(self, root: str = "data", download: bool = True, extra: bool = False) -> None:
        super().__init__(root, download)
        self.extra = extra

    def prepare(self) -> None:
        """Check that the files are there, or bring them."""
        super().prepare()
        if self.extra:
            try:
                self._open("extra")
            except RuntimeError:
                self._fetch("extra")

    def _open(self, split: str, download: bool = False) -> Any:
        from torchvision import datasets

        return datasets.SVHN(self.root, split=split, download=download)

    def _tensors(self, dataset: Any) -> tuple[Any, Any]:
        return dataset.data, dataset.labels

    def unlabeled(self) -> Samples | None:
        """What the source brings without labels, or None."""
        return self._samples("extra") if self.extra else None


class STL10(_TorchvisionSource):
    """STL-10: 5,000 + 8,000 colour photographs, 96 × 96, and 100,000 unlabelled ones.

    Args:
        root: folder of all data sets.
        download: fetch the set when it is not there.
        fold: a number 0..9 trains on one of the ten official folds of 1,000 labelled samples, as published results do;
            the other labelled ones are left out.
    """

    classes = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    size = 96
    mean = (0.4467, 0.4398, 0.4066)
    std = (0.2603, 0.2566, 0.2713)
    folder = "stl10_binary"
    files = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin", "fold_indices.txt")

    def __init__(self, root: str = "data", download: bool = True, fold: int | None = None) -> None:
        super().__init__(root, download)
        if fold is not None and not 0 <= fold <= 9:
            raise UserError(f"STL10: fold={fold} must be 0..9, or null for all 5,000 labelled samples")
        self.fold = fold

    def _open(self, split: str, download: bool = False) -> Any:
        from torchvision import datasets

        return datasets.STL10(self.root, split=split, folds=self.fold if split == "train" else None, download=download)

    def _tensors(self, dataset: Any) -> tuple[Any, Any]:
        return dataset.data, dataset.labels

    def unlabeled(self) -> Samples | None:
        """What the source brings without labels, or None."""
        return self._samples("unlabeled")
