"""Sets of samples and the sources that hold them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.splits import generator
from datamodules.transforms.views import Strong, View, Weak
from zoo.core.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


class MissingData(UserError, FileNotFoundError):  # noqa: N818 (what is wrong is in the name)
    """Data that is neither on this machine nor could be brought to it."""


class Samples(Dataset, ABC):
    """A set of images indexed by whole lists.

    ``samples[[3, 5]]`` is ``{"image": uint8 (2, C, H, W), "label": int64 (2,), "index": int64 (2,)}`` and one entry
    per column. ``index`` is the sample's number in the source, which survives :meth:`subset`.

    Args:
        labels: (N,) int64, -1 where no label is known.
        ids: (N,) stable numbers; 0..N-1 if not given.
        columns: further tensors of length N (``domain``, ``probabilities`` ...).
    """

    in_memory: bool = True

    def __init__(self, labels: Tensor, ids: Tensor | None = None, columns: dict[str, Tensor] | None = None) -> None:
        self.labels = labels.long()
        self.ids = torch.arange(len(labels)) if ids is None else ids
        self.columns = dict(columns or {})

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        where = torch.as_tensor(indices, dtype=torch.int64)
        return {
            "image": self.images_at(where),
            "label": self.labels[where],
            "index": self.ids[where],
            **{name: column[where] for name, column in self.columns.items()},
        }

    @abstractmethod
    def images_at(self, where: Tensor) -> Tensor:
        """The images at these positions, uint8 (B, C, H, W)."""

    @abstractmethod
    def _select(self, where: Tensor) -> dict[str, Any]:
        """The constructor's arguments for a subset, without labels, ids and columns."""

    def subset(self, indices: Tensor) -> Self:
        """The samples at these positions, with their stable numbers."""
        columns = {name: column[indices] for name, column in self.columns.items()}
        chosen = self._select(indices)
        return type(self)(**chosen, labels=self.labels[indices], ids=self.ids[indices], columns=columns)

    def with_columns(self, **columns: Tensor) -> Self:
        """The same samples with further columns, each of length N."""
        for name, column in columns.items():
            if len(column) != len(self):
                raise UserError(f"column {name!r} has {len(column)} rows for {len(self)} samples")
        chosen = self._select(torch.arange(len(self)))
        return type(self)(**chosen, labels=self.labels, ids=self.ids, columns={**self.columns, **columns})


class TensorSamples(Samples):
    """Images in memory.

    Args:
        images: (N, C, H, W) or (N, H, W) uint8.
        labels: (N,).
        ids: stable numbers.
        columns: further tensors of length N.

    Raises:
        TypeError: when the images are not uint8.
        ValueError: when shapes do not fit.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, ids: Tensor | None = None, columns: dict[str, Tensor] | None = None
    ) -> None:
        if images.dtype != torch.uint8:
            raise TypeError(f"TensorSamples: images are {images.dtype}, they must be uint8 (0..255)")
        if images.ndim == 3:
            images = images.unsqueeze(1)
        if images.ndim != 4 or len(images) != len(labels):
            raise UserError(f"TensorSamples: images {tuple(images.shape)} do not go with {len(labels)} labels")
        super().__init__(labels, ids, columns)
        self.images = images

    def images_at(self, where: Tensor) -> Tensor:
        """The images at these positions, uint8 (B, C, H, W)."""
        return self.images[where]

    def _select(self, where: Tensor) -> dict[str, Any]:
        # the pixels of the whole set are not copied for "all of them"
        everything = len(where) == len(self.images) and bool((where == torch.arange(len(where))).all())
        return {"images": self.images if everything else self.images[where]}


class TokenSamples(Samples):
    """Texts in memory as rows of token ids, handed over as int64 under the key ``image``, the input's.

    Args:
        tokens: (N, L) integers; kept as int32.
        labels: (N,).
        ids: stable numbers.
        columns: further tensors of length N.

    Raises:
        UserError: when shapes do not fit.
    """

    def __init__(
        self, tokens: Tensor, labels: Tensor, ids: Tensor | None = None, columns: dict[str, Tensor] | None = None
    ) -> None:
        if tokens.ndim != 2 or len(tokens) != len(labels) or tokens.is_floating_point():
            raise UserError(f"TokenSamples: ids {tuple(tokens.shape)} do not go with {len(labels)} labels")
        super().__init__(labels, ids, columns)
        self.tokens = tokens.int()

    def images_at(self, where: Tensor) -> Tensor:
        """The ids at these positions, int64 (B, L)."""
        return self.tokens[where].long()

    def _select(self, where: Tensor) -> dict[str, Any]:
        return {"tokens": self.tokens[where]}


class FileSamples(Samples):
    """Images read from files when asked for, brought to one size.

    The shorter side is resized to ``size`` and the middle square is cut out. Grey, palette and transparent images are
    converted (transparent pixels become white).

    Args:
        paths: N image files.
        labels: (N,).
        size: height and width of what is handed over.
        channels: 3 (colour) or 1 (grey).
        ids: stable numbers.
        columns: further tensors of length N.

    Raises:
        ValueError: on reading, when a file is no readable image; the message names the file.
    """

    in_memory = False

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        size: int,
        channels: int = 3,
        ids: Tensor | None = None,
        columns: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(labels, ids, columns)
        self.paths = list(paths)
        self.size = size
        self.channels = channels

    def images_at(self, where: Tensor) -> Tensor:
        """The images at these positions, uint8 (B, C, H, W)."""
        if not len(where):
            return torch.empty(0, self.channels, self.size, self.size, dtype=torch.uint8)
        return torch.stack([read_image(self.paths[i], self.size, self.channels) for i in where.tolist()])

    def _select(self, where: Tensor) -> dict[str, Any]:
        return {"paths": [self.paths[i] for i in where.tolist()], "size": self.size, "channels": self.channels}


def read_image(path: str | Path, size: int, channels: int = 3) -> Tensor:
    """One image file as uint8 (channels, size, size): middle square, shorter side resized to ``size``.

    Raises:
        ValueError: when the file is missing or no readable image.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (size, size))  # JPEG decodes straight to a smaller size where that loses nothing
            image = _flatten(opened, channels)
    except Exception as error:  # PIL raises a dozen kinds, also SyntaxError and DecompressionBombError
        raise UserError(f"cannot read the image {str(path)!r}: {error}") from error
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, channels).permute(2, 0, 1).contiguous()


def _flatten(image: Any, channels: int) -> Any:
    """Any PIL mode as RGB or L, transparency over white."""
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: PIL would clip, not scale
        low, high = image.convert("F").getextrema()
        scale = 255 / high if high > 255 else 1.0
        image = image.convert("F").point(lambda value: value * scale + 0).convert("L") if low >= 0 else image
    return image.convert("RGB" if channels == 3 else "L")


class Source(ABC):
    """Where samples come from. The constructor reads nothing; :meth:`prepare` checks or fetches, once per machine.

    Attributes:
        classes: names in the order of the class numbers.
        channels: 1 or 3.
        size: height and width of the images.
        mean: per channel, of pixels in 0..1.
        std: per channel.
        flip: whether a mirrored image still shows its class (not so for digits).
        streams: whether samples are read from files one by one.
        modality: ``"image"``, or ``"text"`` for sources of token ids (B, L).
    """

    modality: str = "image"
    classes: tuple[str, ...] = ()
    channels: int = 3
    size: int = 32
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    flip: bool = True
    streams: bool = False

    @property
    def name(self) -> str:
        """The source's name in messages and files."""
        return type(self).__name__

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def prepare(self) -> None:  # noqa: B027 (most need nothing)
        """Check that the data is there, or fetch it.

        Raises:
            MissingData: naming the folder looked in and what would bring the data.
        """

    @abstractmethod
    def train(self) -> Samples:
        """The training samples, with labels."""

    @abstractmethod
    def test(self) -> Samples:
        """The test samples, with labels."""

    def unlabeled(self) -> Samples | None:
        """Samples without labels that the source brings beside its training set, if any."""
        return None

    def weak_view(self) -> View:
        """The weak view where none is given: a shift by an eighth, and a mirror where the classes survive one."""
        return Weak(flip=self.flip, crop_padding=0.125, padding="reflect" if self.flip else "black")

    def strong_view(self) -> View:
        """The strong view where none is given: FixMatch's, restricted to what keeps a digit's meaning for digits."""
        if self.flip:
            return Strong(flip=True, crop_padding=0.125)
        return Strong(ops="digits", flip=False, crop_padding=0.125, padding="black")


def holdout(labels: Tensor, per_class: int | Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A fixed split for sets that come without one: (rest, held out), both sorted and stratified."""
    from datamodules.splits import stratified

    wanted = torch.full((num_classes,), per_class) if isinstance(per_class, int) else per_class
    held = stratified(labels, wanted, generator(seed))
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held] = False
    return rest.nonzero().flatten(), held


def list_images(folder: Path) -> list[Path]:
    """All image files under a folder, sorted; hidden ones are passed over."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def unreadable_images(paths: Iterable[str | Path], decode: bool = False) -> dict[str, str]:
    """Those of the files that cannot be read, each with the reason.

    Without ``decode`` only headers are read, and the last bytes of PNG and JPEG files: one that ends too early is then
    read as a whole to be sure. That finds missing, empty, foreign and cut-off files in a fraction of the time, but not
    damage in the middle. Of large sets the answer is kept (below ``$XDG_CACHE_HOME`` or ``~/.cache``) until a file
    changes.

    Args:
        paths: image files.
        decode: read every file as a whole.
    """
    from concurrent.futures import ThreadPoolExecutor

    names = list(dict.fromkeys(map(str, paths)))
    kept = _kept_answer(names, decode) if len(names) >= _MANY else None
    if kept is not None and kept.is_file():
        try:
            return dict(json.loads(kept.read_text(encoding="utf-8")))
        except ValueError:
            pass  # cut off while it was written: find out anew
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:  # waits for the disk, mostly
        reasons = pool.map(lambda name: _reason(name, decode), names)
        broken = {name: reason for name, reason in zip(names, reasons, strict=True) if reason is not None}
    if kept is not None:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(broken), encoding="utf-8")
    return broken


_MANY = 2_000
_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}


def _reason(name: str, decode: bool) -> str | None:
    from PIL import Image

    try:
        with Image.open(name) as image:
            end = _ENDS.get(image.format or "")
            if decode or (end is not None and not _ends_with(name, end)):
                image.load()
    except Exception as error:  # PIL raises a dozen kinds, also SyntaxError and DecompressionBombError
        return str(error) or type(error).__name__
    return None


def _ends_with(name: str, end: bytes) -> bool:
    """Whether it stands within the last bytes: some programs write a little behind it."""
    with open(name, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
        return end in file.read()


def _kept_answer(names: Sequence[str], decode: bool) -> Path:
    digest = hashlib.sha256(f"1 {decode}".encode())
    for name in names:
        try:
            status = os.stat(name)
            digest.update(f"{os.path.abspath(name)} {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{os.path.abspath(name)} missing\n".encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labelight"
    return folder / f"images-{digest.hexdigest()[:32]}.json"
