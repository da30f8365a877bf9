"""Image sets of WILDS, read from their folders; the package ``wilds`` is not needed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datamodules.sources.base import MissingData
from datamodules.sources.domain_files import DomainFiles, NamedRows, Protocol
from zoo.core.errors import UserError, suggest


class _Row(NamedTuple):
    path: str
    label: str
    split: str  # of WILDS
    group: str  # what its papers call the domain


def _table(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _camelyon17(folder: Path) -> Iterator[_Row]:
    held = {"1": "val", "2": "test"}  # hospitals of which no sample is in training
    for row in _table(folder / "metadata.csv"):
        patch = f"patient_{row['patient']}_node_{row['node']}"
        path = f"patches/{patch}/patch_{patch}_x_{row['x_coord']}_y_{row['y_coord']}.png"
        split = held.get(row["center"]) or ("train" if row["split"] == "0" else "id_val")
        yield _Row(path, ("normal", "tumor")[int(row["tumor"])], split, f"hospital_{row['center']}")


def _iwildcam(folder: Path) -> Iterator[_Row]:
    names = folder / "categories.csv"
    named = {row["y"]: row["name"] for row in _table(names)} if names.is_file() else {}
    for row in _table(folder / "metadata.csv"):
        label = named.get(row["y"], row["y"])
        yield _Row(f"train/{row['filename']}", label, row["split"], f"location_{row['location_remapped']}")


def _fmow(folder: Path) -> Iterator[_Row]:
    regions = {row["alpha-3"]: row["region"] for row in _table(folder / "country_code_mapping.csv")}
    for number, row in enumerate(_table(folder / "rgb_metadata.csv")):
        if row["split"] == "seq":
            continue  # kept back by the makers of the set
        year, split = int(row["timestamp"][:4]), row["split"]
        period = "" if year < 2013 else "val" if year < 2016 else "test"
        if not period:
            split = split if split == "train" else f"id_{split}"
        elif split != period:
            split = ""  # in no part of WILDS
        region = regions.get(row["country_code"]) or "Other"
        yield _Row(f"images/rgb_img_{number}.png", row["category"], split, f"region_{region}")


_READERS: dict[str, tuple[str, str, Callable[[Path], Iterator[_Row]]]] = {
    "camelyon17": ("metadata.csv", "hospital_0", _camelyon17),
    "iwildcam": ("metadata.csv", "location_12", _iwildcam),
    "fmow": ("rgb_metadata.csv", "region_Asia", _fmow),
}


class WILDS(DomainFiles):
    """Camelyon17, iWildCam and FMoW of WILDS, from the folder that the package ``wilds`` downloads.

    A domain is one of the set's parts, as in its papers (``train``; ``val`` and ``test``, of other hospitals, places or
    years; ``id_val`` and ``id_test``), or one group: ``hospital_0`` to ``hospital_4``, ``location_12``,
    ``region_Asia``. Images are cut to a square, which those of iWildCam are not.

    Args:
        root: the folder that holds ``camelyon17_v1.0`` and the like, or that folder.
        dataset: ``camelyon17`` (tumour or not, 5 hospitals), ``iwildcam`` (182 species, 323 camera traps) or ``fmow``
            (62 uses of land by region and year).
        domain: a part or a group.
        size: height and width images are brought to.
        protocol: ``transductive``, all images of the domain as training and as test set, or ``holdout``.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.

    Source: Koh et al. 2021, arXiv 2012.07421.
    """

    def __init__(
        self,
        root: str,
        dataset: Literal["camelyon17", "iwildcam", "fmow"],
        domain: str = "train",
        size: int = 224,
        protocol: Protocol | None = None,
        **kwargs: Any,
    ) -> None:
        if dataset not in _READERS:
            near = suggest(dataset, _READERS)
            raise UserError(f"WILDS: dataset={dataset!r} must be one of {', '.join(_READERS)}.{near}")
        self.dataset = dataset
        super().__init__(root, domain, size, protocol, **kwargs)

    @property
    def name(self) -> str:
        """With the set and the domain."""
        return f"WILDS ({self.dataset}, {self.domain})"

    def expected(self) -> Sequence[str]:
        """The table of the set."""
        table = _READERS[self.dataset][0]
        return (f"{self.root}/{self.dataset}_v*/{table}", f"{self.root}/{table}")

    def _folder(self) -> Path:
        root = Path(self.root)
        table = _READERS[self.dataset][0]
        found = [folder for folder in (*sorted(root.glob(f"{self.dataset}_v*")), root) if (folder / table).is_file()]
        if not found:
            raise self.missing(f"has no {self.dataset}")
        return found[0]

    def find(self) -> dict[str, NamedRows]:
        """The images of the part or group."""
        folder, (_, example, read) = self._folder(), _READERS[self.dataset]
        names: set[str] = set()
        chosen: NamedRows = []
        try:
            for row in read(folder):
                names |= {row.split, row.group} - {""}
                self._classes_found.add(row.label)
                if self.domain in (row.split, row.group):
                    chosen.append((str(folder / row.path), row.label))
        except (KeyError, IndexError, ValueError, FileNotFoundError) as error:
            raise MissingData(f"{self.name}: {folder} is not the folder of {self.dataset}: {error!r}") from error
        if not chosen:
            near = suggest(self.domain, names)
            raise UserError(
                f"WILDS: {self.dataset} has no domain {self.domain!r}; it has parts such as 'train' and 'test' and "
                f"groups such as {example!r}.{near}"
            )
        return {"all": chosen}

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """The classes of the whole set, which not every place has seen."""
        numbers = all(name.isdigit() for name in self._classes_found)
        return tuple(sorted(self._classes_found, key=int) if numbers else sorted(self._classes_found))

    @property
    def _classes_found(self) -> set[str]:
        return self.__dict__.setdefault("_every_class", set())
