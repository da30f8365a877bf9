"""Images in folders and in lists of files: read one by one, when asked for."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from datamodules.sources.base import (
    IMAGE_SUFFIXES,
    FileSamples,
    MissingData,
    Samples,
    Source,
    list_images,
    unreadable_images,
)
from datamodules.splits import counts, generator, proportional, stratified
from zoo.core.errors import UserError, suggest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Files(Source):
    """Base of sources whose samples are image files.

    Args:
        size: height and width images are brought to (shorter side resized, middle square).
        channels: 3 or 1.
        mean: per channel in 0..1; ImageNet's if not given.
        std: per channel; ImageNet's if not given.
        flip: whether mirrored images still show their class.
        test_fraction: share held out as test set where nothing else makes a split.
        skip_broken: pass over unreadable images, which a warning counts and names, instead of refusing to start; to
            find them every image is read once.
        seed: of that split.

    Raises:
        UserError: for a size, a number of channels or a share that cannot be.
    """

    streams = True
    _broken: frozenset[str] | None = None

    def __init__(
        self,
        size: int = 224,
        channels: int = 3,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        flip: bool = True,
        test_fraction: float = 0.2,
        skip_broken: bool = False,
        seed: int = 0,
    ) -> None:
        if channels not in (1, 3):
            raise UserError(f"{self.name}: channels={channels} must be 1 (grey) or 3 (colour)")
        if not 0 < test_fraction < 1:
            raise UserError(f"{self.name}: test_fraction={test_fraction} must be between 0 and 1")
        if size < 1:
            raise UserError(f"{self.name}: size={size} must be at least 1")
        self.size = size
        self.channels = channels
        self.mean = tuple(mean) if mean else (IMAGENET_MEAN if channels == 3 else (0.5,))
        self.std = tuple(std) if std else (IMAGENET_STD if channels == 3 else (0.25,))
        self.flip = flip
        self.skip_broken = skip_broken
        self.test_fraction = test_fraction
        self.seed = seed

    def _rows(self) -> dict[str, list[tuple[str, int]]]:
        """Part (``train``, ``test``, ``all``, ``unlabeled``) to (path, label) rows."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Check that there are images and that they can be read; with ``skip_broken``, say which are passed over.

        Raises:
            MissingData: when the folder or its images are missing.
            UserError: when images cannot be read; see :func:`~datamodules.sources.base.unreadable_images`.
        """
        rows = self._rows()
        if self.skip_broken:
            self._find_broken(rows)
            return
        paths = list(dict.fromkeys(path for part in rows.values() for path, _ in part))
        broken = unreadable_images(paths)
        if broken:
            first, reason = next(iter(broken.items()))
            others = "".join(f", {path!r}" for path in list(broken)[1:5]) + (" ..." if len(broken) > 5 else "")
            raise UserError(
                f"{self.name}: cannot read the image {first!r}: {reason}. {len(broken)} of {len(paths)} images cannot "
                f"be read{f' (also {others[2:]})' if others else ''}; skip_broken: true passes over them"
            )

    def _find_broken(self, rows: dict[str, list[tuple[str, int]]]) -> frozenset[str]:
        if self._broken is None:
            paths = list(dict.fromkeys(path for part in rows.values() for path, _ in part))
            broken = unreadable_images(paths, decode=True)
            self._broken = frozenset(broken)
            if broken:
                named = "".join(f"\n  {path!r}: {reason}" for path, reason in broken.items())
                warnings.warn(
                    f"{self.name}: passing over {len(broken)} of {len(paths)} images that cannot be read:{named}",
                    stacklevel=2,
                )
        return self._broken

    def _part(self, part: str) -> FileSamples | None:
        rows = self._rows()
        if self.skip_broken:
            broken = self._find_broken(rows)
            rows = {name: [row for row in found if row[0] not in broken] for name, found in rows.items()}
        chosen = rows.get(part)
        if chosen is None and "all" in rows and part in ("train", "test"):
            chosen = self._cut(rows["all"], part)
        if chosen is None:
            return None
        labels = torch.tensor([label for _, label in chosen], dtype=torch.int64)
        return FileSamples([path for path, _ in chosen], labels, self.size, self.channels)

    def _cut(self, rows: list[tuple[str, int]], part: str) -> list[tuple[str, int]]:
        """A fixed stratified split of images that come without one."""
        labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
        available = counts(labels, self.num_classes, self.name)
        wanted = proportional(available, round(self.test_fraction * len(rows)))
        held = set(stratified(labels, wanted, generator(self.seed)).tolist())
        return [row for position, row in enumerate(rows) if (position in held) == (part == "test")]

    def _required(self, part: str) -> Samples:
        samples = self._part(part)
        if samples is None or len(samples) == 0:
            raise MissingData(f"{self.name}: no {part} images")
        return samples

    def train(self) -> Samples:
        """The training samples, with labels."""
        return self._required("train")

    def test(self) -> Samples:
        """The test samples, with labels."""
        return self._required("test")

    def unlabeled(self) -> Samples | None:
        """What the source brings without labels, or None."""
        return self._part("unlabeled")


class ImageFolder(Files):
    """A folder per class: ``ROOT/train/CLASS/*.png`` and ``ROOT/test/CLASS/*.png``, or ``ROOT/CLASS/*.png``.

    Class numbers follow the sorted folder names. Instead of ``test`` the folder may be called ``val`` or
    ``validation``. Without such folders a stratified part of the images, drawn by ``seed``, is the test set.
    ``ROOT/unlabeled/*.png`` are further images without labels.

    Args:
        root: the folder.
        size: height and width images are brought to.
        **kwargs: see :class:`Files`.
    """

    def __init__(self, root: str, size: int = 224, **kwargs: Any) -> None:
        super().__init__(size, **kwargs)
        self.root = root
        self._names: tuple[str, ...] | None = None

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Sorted names of the class folders."""
        if self._names is None:
            self._names = tuple(folder.name for folder in _folders(self._train_folder()))
            if not self._names:
                raise self._missing("holds no class folders")
        return self._names

    def _missing(self, what: str) -> MissingData:
        return MissingData(
            f"ImageFolder: root={self.root!r} ({Path(self.root).resolve()}) {what}. Expected:\n"
            f"  {self.root}/train/CLASS/*.png  and  {self.root}/test/CLASS/*.png\n"
            f"or {self.root}/CLASS/*.png"
        )

    def _train_folder(self) -> Path:
        root = Path(self.root)
        if not root.is_dir():
            raise self._missing("does not exist")
        return root / "train" if (root / "train").is_dir() and not _is_class_train(root / "train") else root

    def _test_folder(self) -> Path | None:
        if self._train_folder() == Path(self.root):
            return None
        for name in ("test", "val", "validation"):
            if (Path(self.root) / name).is_dir():
                return Path(self.root) / name
        return None

    def _rows(self) -> dict[str, list[tuple[str, int]]]:
        train, test = self._train_folder(), self._test_folder()
        rows = {"all" if test is None else "train": self._read(train)}
        if test is not None:
            unknown = sorted(folder.name for folder in _folders(test) if folder.name not in self.classes)
            if unknown:
                raise UserError(f"ImageFolder: {test} has class folders that {train} has not: {', '.join(unknown)}")
            rows["test"] = self._read(test)
        if not next(iter(rows.values())):
            raise self._missing("holds no images")
        loose = Path(self.root) / "unlabeled"
        if loose.is_dir():
            rows["unlabeled"] = [(str(path), -1) for path in list_images(loose)]
            if not rows["unlabeled"]:
                raise MissingData(
                    f"ImageFolder: {loose} holds no images ({', '.join(IMAGE_SUFFIXES)}); "
                    "put the unlabelled ones there, or take the folder away"
                )
        return rows

    def _read(self, folder: Path) -> list[tuple[str, int]]:
        return [(str(path), label) for label, name in enumerate(self.classes) for path in list_images(folder / name)]


class FileList(Files):
    """Images named in a text file: lines ``path label`` (the last space divides), or a CSV with columns path and label.

    Labels are class numbers from 0, or class names (numbered in sorted order); lists that count from 1 are refused
    until they say ``first_label: 1``. Further columns of a CSV are not looked at.
    Paths are relative to ``root``. An empty label or -1 means unlabelled.

    Args:
        list_file: the training list.
        test_list: the test list; without it a stratified part of the training list is held out.
        root: folder that paths start from; the list's own folder if not given.
        size: height and width images are brought to.
        classes: names in the order of the class numbers; found from the lists if not given.
        first_label: the number of the first class in the lists; 0 if not given, and then some label has to be 0 where
            the classes are found from the lists.
        path_column: a CSV's column of paths.
        label_column: a CSV's column of labels.
        **kwargs: see :class:`Files`.
    """

    def __init__(
        self,
        list_file: str,
        test_list: str | None = None,
        root: str | None = None,
        size: int = 224,
        classes: tuple[str, ...] | None = None,
        first_label: int | None = None,
        path_column: str = "path",
        label_column: str = "label",
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.list_file = list_file
        self.test_list = test_list
        self.root = root
        self.first_label = first_label or 0
        self._counted_from_is_said = first_label is not None
        self.path_column = path_column
        self.label_column = label_column
        self._names = tuple(classes) if classes else None
        self._raw: dict[str, list[tuple[str, str]]] = {}

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Class names, or numbers as text where the lists hold numbers."""
        if self._names is None:
            found = {label for name in self._lists() for _, label in self._read(name) if label not in ("", "-1")}
            if all(_is_number(label) for label in found):
                lowest = min((int(label) for label in found), default=0)
                highest = max((int(label) for label in found), default=self.first_label - 1)
                if lowest > 0 and not self._counted_from_is_said:
                    raise UserError(
                        f"FileList: the labels in {self.list_file} run from {lowest} to {highest}. If they count from "
                        f"{lowest}, say first_label: {lowest}; if only the lower classes are absent, first_label: 0"
                    )
                self._names = tuple(str(label) for label in range(highest - self.first_label + 1))
            else:
                self._names = tuple(sorted(found))
        return self._names

    def _lists(self) -> list[str]:
        return [self.list_file] + ([self.test_list] if self.test_list else [])

    def _read(self, name: str) -> list[tuple[str, str]]:
        if name not in self._raw:
            file = Path(name)
            if not file.is_file():
                raise MissingData(
                    f"FileList: there is no list {name!r} ({file.resolve()}). "
                    "Expected lines 'path label', or a CSV file with the columns path and label"
                )
            with file.open(encoding="utf-8-sig", newline="") as lines:  # spreadsheets begin a file with a mark
                if file.suffix.lower() == ".csv":
                    self._raw[name] = list(self._csv_rows(name, csv.DictReader(lines)))
                else:
                    numbered = enumerate(lines, 1)
                    self._raw[name] = [_divide(line.strip(), name, n) for n, line in numbered if line.strip()]
        return self._raw[name]

    def _csv_rows(self, name: str, table: csv.DictReader[str]) -> Iterator[tuple[str, str]]:
        columns = table.fieldnames or ()
        missing = [column for column in (self.path_column, self.label_column) if column not in columns]
        if missing:
            raise UserError(
                f"FileList: {name} has the columns {', '.join(columns) or '(none)'}; {self.path_column} and "
                f"{self.label_column} are needed. Other names: path_column and label_column."
                f"{suggest(missing[0], columns)}"
            )
        for row in table:
            path, label = row[self.path_column], row[self.label_column]
            if None in row or not path or label is None:
                wrong = f"not the {len(columns)} fields of the header" if path else "no path"
                raise UserError(f"FileList: {name}, line {table.line_num}: {wrong}")
            yield path, label.strip()

    def _rows(self) -> dict[str, list[tuple[str, int]]]:
        train = self._number(self.list_file)
        known = [row for row in train if row[1] >= 0]
        rows = {"all" if self.test_list is None else "train": known}
        if self.test_list is not None:
            rows["test"] = self._number(self.test_list)
        if len(known) < len(train):
            rows["unlabeled"] = [row for row in train if row[1] < 0]
        if not known:
            raise MissingData(f"FileList: {self.list_file} names no labelled images")
        return rows

    def _hint(self, label: str, number: int) -> str:
        counts_from_one = label == str(number) and not self._counted_from_is_said
        return "; a list that counts from 1 says first_label: 1" if counts_from_one else ""

    def _number(self, name: str) -> list[tuple[str, int]]:
        root = Path(self.root) if self.root is not None else Path(name).parent
        numbers = {label: number for number, label in enumerate(self.classes)}
        rows = []
        for path, label in self._read(name):
            if label in ("", "-1"):
                number = -1
            elif label in numbers and not _is_number(label):
                number = numbers[label]
            elif _is_number(label) and 0 <= int(label) - self.first_label < len(numbers):
                number = int(label) - self.first_label
            else:
                raise UserError(
                    f"FileList: {name} gives {path!r} the label {label!r}, which is none of the classes"
                    f"{self._hint(label, len(numbers))}"
                )
            rows.append((str(root / path), number))
        return rows


def _folders(folder: Path) -> list[Path]:
    reserved = {"train", "test", "val", "validation", "unlabeled"}
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and (path.name not in reserved or _is_class_train(path))
    )


def _is_class_train(folder: Path) -> bool:
    """Whether a folder ``train`` shows trains, as in VisDA: it then holds images, and no folder of a class."""
    for child in folder.iterdir() if folder.name == "train" else ():
        if child.is_dir():
            return False
        if child.suffix.lower() in IMAGE_SUFFIXES:
            return True
    return False


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _divide(line: str, name: str, number: int) -> tuple[str, str]:
    path, _, label = line.rpartition(" ")
    if not path:
        raise UserError(f"FileList: {name}, line {number} is {line!r}; expected 'path label'")
    return path, label
