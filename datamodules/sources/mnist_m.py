"""Digits on natural backgrounds: the set of the paper, and its recipe for any digits and photographs."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from datamodules.sources.base import MissingData, Samples, Source, TensorSamples, list_images, read_image
from datamodules.sources.domain_files import listing, read_list
from datamodules.sources.wrapped import WrappedSource
from datamodules.splits import generator
from zoo.core.errors import UserError


class MNISTM(Source):
    """MNIST-M: MNIST's digits blended with patches of photographs, 59,001 + 9,001 images, 32 × 32, in memory.

    Read as ``ROOT/mnist_m/mnist_m_train/*.png`` with ``ROOT/mnist_m/mnist_m_train_labels.txt``, and ``_test`` alike.
    Without it, :class:`BlendedDigits` makes such digits.

    Args:
        root: the folder that holds ``mnist_m``, or that folder.
        size: height and width; other than 32 is resized bilinearly.

    Source: Ganin et al. 2016, arXiv 1505.07818, section 5.2.1.
    """

    classes = tuple(str(digit) for digit in range(10))
    flip = False

    def __init__(self, root: str = "data", size: int = 32) -> None:
        if size < 1:
            raise UserError(f"MNISTM: size={size} must be at least 1")
        self.root = root
        self.size = size

    def _rows(self, part: str) -> tuple[Path, list[tuple[str, str]]]:
        for folder in (Path(self.root) / "mnist_m", Path(self.root)):
            labels = folder / f"mnist_m_{part}_labels.txt"
            if labels.is_file() and (folder / f"mnist_m_{part}").is_dir():
                return folder / f"mnist_m_{part}", read_list(labels)
        root = Path(self.root)
        raise MissingData(
            f"MNISTM: root={self.root!r} has not the {part} part. Expected:\n"
            f"  {self.root}/mnist_m/mnist_m_{part}/*.png\n"
            f"  {self.root}/mnist_m/mnist_m_{part}_labels.txt (lines 'file label')\n"
            f"Found: {root.resolve()} {f'holds {listing(root)}' if root.is_dir() else 'does not exist'}. "
            "BlendedDigits makes such digits of any others"
        )

    def prepare(self) -> None:
        """Check that both parts are there.

        Raises:
            MissingData: with what was expected and found.
        """
        self._rows("train")
        self._rows("test")

    def _samples(self, part: str) -> Samples:
        folder, rows = self._rows(part)
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda row: read_image(folder / row[0], self.size), rows))
        wrong = next((label for _, label in rows if label not in self.classes), None)
        if wrong is not None:
            raise UserError(f"MNISTM: mnist_m_{part}_labels.txt has the label {wrong!r}; labels are 0 to 9")
        return TensorSamples(torch.stack(images), torch.tensor([int(label) for _, label in rows]))

    def train(self) -> Samples:
        """The training samples, with labels."""
        return self._samples("train")

    def test(self) -> Samples:
        """The test samples, with labels."""
        return self._samples("test")


class BlendedDigits(WrappedSource):
    r"""Grey digits on natural backgrounds, by the recipe of MNIST-M.

    .. math:: x_{kij} = |p_{kij} - d_{ij}|

    with digit d and a patch p that is cut out of a photograph at random, of every colour k. With MNIST and the folder
    of BSDS500 this is the paper's set but for the draw of the patches. Without a folder, patches come from the two
    photographs that scikit-learn brings (a temple, a flower): a smaller shift than the paper's, of far fewer textures,
    and the source's name says so.

    Args:
        source: grey digits in memory.
        images: a folder of photographs, each at least as large as a digit.
        seed: of the patches.

    Raises:
        UserError: for digits that are not grey images in memory, or a photograph that is too small.
        MissingData: for a folder without images.

    Source: Ganin et al. 2016, arXiv 1505.07818, section 5.2.1.
    """

    def __init__(self, source: Source, images: str | None = None, seed: int = 0) -> None:
        super().__init__(source)
        if source.channels != 1:
            raise UserError(f"BlendedDigits: {source.name} has {source.channels} channels; digits have to be grey")
        self.images = images
        self.seed = seed
        self.channels, self.mean, self.std = 3, (0.5,) * 3, (0.25,) * 3

    @property
    def name(self) -> str:
        """With what the backgrounds are cut from."""
        return f"BlendedDigits({self.source.name}, {self.images or 'two photographs of scikit-learn'})"

    def prepare(self) -> None:
        """What the digits' source checks or fetches, and that there are photographs."""
        super().prepare()
        _ = self._photographs

    @functools.cached_property
    def _photographs(self) -> list[Tensor]:
        """uint8 (3, H, W) each."""
        if self.images is None:
            from sklearn.datasets import load_sample_images

            found = [torch.from_numpy(photograph.copy()) for photograph in load_sample_images().images]
            return [photograph.permute(2, 0, 1) for photograph in found]
        import numpy as np
        from PIL import Image

        folder = Path(self.images)
        paths = list_images(folder) if folder.is_dir() else []
        if not paths:
            raise MissingData(f"BlendedDigits: images={self.images!r} ({folder.resolve()}) holds no photographs")
        photographs = []
        for path in paths:
            with Image.open(path) as opened:
                photographs.append(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
            if min(photographs[-1].shape[1:]) < self.size:
                raise UserError(f"BlendedDigits: {str(path)!r} is smaller than a digit of {self.size} pixels")
        return photographs

    def patches(self, number: int, stream: torch.Generator) -> Tensor:
        """Patches of photographs, uint8 (number, 3, size, size)."""
        size = self.size
        patches = torch.empty(number, 3, size, size, dtype=torch.uint8)
        which = torch.randint(len(self._photographs), (number,), generator=stream)
        places = torch.rand(number, 2, generator=stream)
        for photograph, pixels in enumerate(self._photographs):
            mine = (which == photograph).nonzero().flatten()
            windows = pixels.unfold(1, size, 1).unfold(2, size, 1)  # (3, rows, columns, size, size), nothing is copied
            top, left = (places[mine] * torch.tensor(windows.shape[1:3])).long().unbind(dim=1)
            patches[mine] = windows[:, top, left].transpose(0, 1)
        return patches

    def _blended(self, samples: Samples, part: int) -> Samples:
        if not isinstance(samples, TensorSamples) or samples.images.shape[1] != 1:
            raise UserError(f"BlendedDigits: {self.source.name} has no grey images in memory")
        patches = self.patches(len(samples), generator(self.seed, part)).short()
        images = (patches - samples.images.short()).abs().to(torch.uint8)
        return TensorSamples(images, samples.labels, samples.ids, samples.columns)

    def train(self) -> Samples:
        """The training samples, with labels."""
        return self._blended(self.source.train(), 0)

    def test(self) -> Samples:
        """The test samples, with labels."""
        return self._blended(self.source.test(), 1)

    def unlabeled(self) -> Samples | None:
        """What the source brings without labels."""
        samples = self.source.unlabeled()
        return None if samples is None else self._blended(samples, 2)
