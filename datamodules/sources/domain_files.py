"""Images of several domains below one folder: a folder for each, or lists of files."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.sources.base import MissingData, list_images
from datamodules.sources.folders import FileList, Files, _folders, _is_number
from zoo.core.errors import UserError, check_choice, suggest

NamedRows = list[tuple[str, str]]  # (path, name of the class, or nothing where it is not known)
Protocol = Literal["transductive", "holdout"]


class DomainFiles(Files):
    """What sources of one domain of several share.

    Samples are found with the *names* of their classes, which then give the numbers: a list that counts from 1, or in
    another order than the folders, gives the same labels.

    Args:
        root: the folder of all domains.
        domain: the one to read.
        size: height and width images are brought to (shorter side resized, middle square).
        protocol: ``"transductive"``: all images are both training and test set, as is usual for the target of
            unsupervised adaptation, whose training sees no label; ``"holdout"``: training and test set share no image,
            by the lists of the set where it has them, else by a stratified share that ``seed`` draws once and for all.
        **kwargs: see :class:`~datamodules.sources.folders.Files`.

    Raises:
        UserError: for an unknown protocol; where classes are contradictory.
        MissingData: where there are no images; the message has the expected and the found tree.
    """

    default_protocol: Protocol = "transductive"

    def __init__(
        self,
        root: str,
        domain: str,
        size: int = 224,
        protocol: Protocol | None = None,
        **kwargs: Any,
    ) -> None:
        self.root = root
        self.domain = domain
        super().__init__(size, **kwargs)
        if protocol is not None:
            check_choice(self.name, "protocol", protocol, ("transductive", "holdout"))
        self.protocol: Protocol = protocol or self.default_protocol

    @property
    def name(self) -> str:
        """With the domain: a split of one is none of another."""
        return f"{type(self).__name__} ({self.domain})"

    # What a layout says -----------------------------------------------------------------------------------------------

    def find(self) -> dict[str, NamedRows]:
        """Part (``train`` and ``test``, or ``all``) to the images with the names of their classes."""
        raise NotImplementedError

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names of classes that were found, in the order of their numbers."""
        return tuple(sorted(names))

    def expected(self) -> Sequence[str]:
        """The layouts that are looked for, for messages."""
        raise NotImplementedError

    # What follows from it ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def _found(self) -> dict[str, NamedRows]:
        rows = self.find()
        if not any(rows.values()):
            raise self.missing(f"has no images of the domain {self.domain!r}")
        return rows

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names in the order of the numbers; none for a domain without any label."""
        return self._ordered

    @functools.cached_property
    def _ordered(self) -> tuple[str, ...]:
        return self.order({name for rows in self._found.values() for _, name in rows if name})

    @functools.cached_property
    def _numbered(self) -> dict[str, list[tuple[str, int]]]:
        numbers = {name: number for number, name in enumerate(self.classes)} | {"": -1}
        parts = {part: [(path, numbers[name]) for path, name in rows] for part, rows in self._found.items()}
        everything = list(dict.fromkeys(row for rows in parts.values() for row in rows))
        # A domain without any label cannot be divided by class, and there is nothing to be measured on it.
        if self.protocol == "transductive" or all(label < 0 for _, label in everything):
            return {"train": everything, "test": everything}
        return parts if "test" in parts else {"all": everything}

    def _rows(self) -> dict[str, list[tuple[str, int]]]:
        return self._numbered

    def missing(self, what: str) -> MissingData:
        """The error for a root that has not what is needed: what was expected there, and what there is."""
        root = Path(self.root)
        lines = "".join(f"\n  {layout}" for layout in self.expected())
        found = "does not exist" if not root.is_dir() else f"holds {listing(root)}"
        return MissingData(
            f"{self.name}: root={self.root!r} {what}{'' if what[-1] in '.?' else '.'} "
            f"Expected{' one of' if len(self.expected()) > 1 else ''}:{lines}\n"
            f"Found: {root.resolve()} {found}"
        )


class DomainFolders(DomainFiles):
    """A folder per domain, and in it a folder per class: ``ROOT/DOMAIN/CLASS/*.jpg``.

    A domain's folder may also hold one folder ``images`` with those of the classes, or ``train`` and ``test`` (``val``,
    ``validation``, ``crossval``), which ``protocol: holdout`` follows; what is for validation beside a ``test`` belongs
    to the training set. One that holds images and no folders is a domain without
    labels, which can be the target: ``zoo predict`` then gives its classes.

    Args:
        root: the folder of all domains.
        domain: the name of a folder in it.
        size: height and width images are brought to.
        protocol: see :class:`DomainFiles`; ``transductive`` if not given.
        classes: names in the order of their numbers; sorted names of the folders if not given.
        **kwargs: see :class:`DomainFiles`.
    """

    def __init__(
        self,
        root: str,
        domain: str,
        size: int = 224,
        protocol: Protocol | None = None,
        classes: tuple[str, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, domain, size, protocol, **kwargs)
        self._given = _given(self.name, classes)

    def expected(self) -> Sequence[str]:
        """The one layout."""
        return (f"{self.root}/{self.domain}/CLASS/*.jpg",)

    def find(self) -> dict[str, NamedRows]:
        """The images of the domain's folder."""
        folder = Path(self.root) / self.domain
        if not folder.is_dir():
            near = suggest(self.domain, _subfolders(Path(self.root)))
            raise self.missing(f"has no folder of the domain {self.domain!r}.{near}")
        return folder_parts(folder)

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """The order given, or that of the names."""
        return _in_order(self.name, names, self._given)

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those given, also where there is no such folder; else the names of the folders in it."""
        there = (Path(self.root) / self.domain).is_dir()
        return self._ordered if there or self._given is None else self._given


class DomainLists(DomainFiles):
    """Lists of files, one or two for a domain: lines ``path label``, which the last space divides.

    Where the folders that images lie in name their classes, one folder for every label, these are the classes' names,
    in the order of the labels. Otherwise classes are numbers, and lists that do not count from 0 are refused until they
    say ``first_label``. Labels may also be names. A label of -1 is none.

    Args:
        root: the folder that ``list_file``, ``test_list`` and ``images`` start from.
        domain: what stands for ``{domain}`` in them.
        list_file: the list of the domain, or of its training images.
        test_list: the list of its test images, which ``protocol: holdout`` follows.
        images: the folder that paths start from.
        first_label: the number of the first class in the lists.
        classes: names in the order of their numbers.
        size: height and width images are brought to.
        protocol: see :class:`DomainFiles`; ``transductive`` if not given.
        **kwargs: see :class:`DomainFiles`.
    """

    def __init__(
        self,
        root: str,
        domain: str,
        list_file: str = "image_list/{domain}.txt",
        test_list: str | None = None,
        images: str = "",
        first_label: int | None = None,
        classes: tuple[str, ...] | None = None,
        size: int = 224,
        protocol: Protocol | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, domain, size, protocol, **kwargs)
        self.list_file = list_file
        self.test_list = test_list
        self.images = images
        self.first_label = first_label
        self._given = _given(self.name, classes)
        self._names: tuple[str, ...] = ()

    def _path(self, pattern: str) -> Path:
        return Path(self.root) / pattern.replace("{domain}", self.domain)

    def expected(self) -> Sequence[str]:
        """The lists."""
        lists = [self.list_file] + ([self.test_list] if self.test_list else [])
        return [f"{Path(self.root) / name.replace('{domain}', self.domain)} (lines 'path label')" for name in lists]

    def find(self) -> dict[str, NamedRows]:
        """The images of the lists."""
        patterns = {"all": self.list_file} if self.test_list is None else {"train": self.list_file}
        if self.test_list is not None:
            patterns["test"] = self.test_list
        raw = {}
        for part, pattern in patterns.items():
            if not self._path(pattern).is_file():
                near = suggest(self.domain, self._domains(pattern))
                raise self.missing(f"has no list {self._path(pattern).relative_to(self.root)}.{near}")
            raw[part] = read_list(self._path(pattern))
        self._names, names = self._names_of(raw)
        images = self._path(self.images)
        return {part: [(str(images / path), names(path, label)) for path, label in rows] for part, rows in raw.items()}

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """The order given, or that of the labels."""
        return self._names

    def _domains(self, pattern: str) -> list[str]:
        """The domains that there are such lists of."""
        before, _, after = pattern.partition("{domain}")
        found = Path(self.root).glob(f"{before}*{after}") if "{domain}" in pattern else ()
        return [str(file.relative_to(self.root))[len(before) : -len(after) or None] for file in found]

    def _names_of(self, raw: dict[str, NamedRows]) -> tuple[tuple[str, ...], Callable[[str, str], str]]:
        """The classes' names in order, and what gives a row's."""
        rows = [row for part in raw.values() for row in part if row[1] not in ("", "-1")]
        labels = {label for _, label in rows}
        if not all(map(_is_number, labels)):
            names = _in_order(self.name, labels, self._given)
            return names, lambda path, label: "" if label == "-1" else label
        folders = _one_to_one(rows)
        if self._given is None and folders is not None:
            names = tuple(folders[label] for label in sorted(folders, key=int))
            return names, lambda path, label: folders.get(label, "")
        lowest, highest = (min(map(int, labels)), max(map(int, labels))) if labels else (0, -1)
        said = self.first_label is not None
        full = self._given is None or highest >= len(self._given)
        if not said and lowest > 0 and full:
            raise UserError(
                f"{self.name}: the labels in {self.list_file} run from {lowest} to {highest}. If they count from "
                f"{lowest}, say first_label: {lowest}; if only the lower classes are absent, first_label: 0"
            )
        first = self.first_label or 0
        names = self._given or tuple(str(number) for number in range(highest - first + 1))
        outside = [label for label in sorted(labels, key=int) if not 0 <= int(label) - first < len(names)]
        if outside:
            raise UserError(
                f"{self.name}: label {outside[0]} in {self.list_file} is none of the {len(names)} classes, which are "
                f"numbered from first_label: {first}"
            )
        known = {plain(name): name for name in names}
        for path, label in rows:
            name = names[int(label) - first]
            folder = known.get(plain(_folder_of(path)), name)
            if folder != name:
                raise UserError(
                    f"{self.name}: {path!r} has the label {label}, which is {name!r} where first_label is {first}, but "
                    f"lies in the folder {_folder_of(path)!r}; mend first_label or the order of classes"
                )
        return names, lambda path, label: "" if label in ("", "-1") else names[int(label) - first]


def folder_parts(folder: Path) -> dict[str, NamedRows]:
    """The images of a domain's folder, by the folders of their classes."""
    inside = _folders(folder)
    if [child.name for child in inside] == ["images"]:
        folder, inside = inside[0], _folders(inside[0])
    train = folder / "train"
    held = [folder / name for name in ("test", "val", "validation", "crossval") if (folder / name).is_dir()]
    if train.is_dir() and train not in inside:
        parts = {"train": [row for part in (train, *held[1:]) for row in _by_class(part)]}
        return parts | {"test": _by_class(held[0])} if held else parts
    rows = _by_class(folder)
    return {"all": rows or [(str(path), "") for path in list_images(folder)]}


def _by_class(folder: Path) -> NamedRows:
    return [(str(path), child.name) for child in _folders(folder) for path in list_images(child)]


def read_list(file: Path) -> list[tuple[str, str]]:
    """Rows (path, label) of a list: lines that the last space divides, or a CSV with columns path and label."""
    return FileList(str(file))._read(str(file))


def plain(name: str) -> str:
    """A name without what spellings differ in: case, spaces, and marks."""
    return re.sub(r"[^0-9a-z]", "", name.casefold())


def listing(folder: Path, most: int = 10) -> str:
    """The names of what is in a folder, folders with a slash; the first few."""
    with os.scandir(folder) as entries:
        names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "nothing"


def _subfolders(folder: Path) -> list[str]:
    return [child.name for child in folder.iterdir() if child.is_dir()] if folder.is_dir() else []


def _folder_of(path: str) -> str:
    """The name of the folder that an image of a list lies in."""
    return Path(path).parent.name


def _one_to_one(rows: Iterable[tuple[str, str]]) -> dict[str, str] | None:
    """Label to folder, where every label has one folder of its own and there are several."""
    folders: dict[str, str] = {}
    for path, label in rows:
        if folders.setdefault(label, _folder_of(path)) != _folder_of(path):
            return None
    distinct = set(folders.values())
    return folders if len(distinct) == len(folders) > 1 and "" not in distinct else None


def _given(owner: str, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if classes is not None and (not classes or len(set(classes)) < len(classes)):
        raise UserError(f"{owner}: classes={tuple(classes)} must name at least one class, and each once")
    return tuple(classes) if classes is not None else None


def _in_order(owner: str, names: Iterable[str], given: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names as given, or sorted."""
    if given is None:
        return tuple(sorted(names))
    other = sorted(set(names) - set(given))
    if other:
        raise UserError(f"{owner}: {other[0]!r} is none of the classes given.{suggest(other[0], given)}")
    return given
