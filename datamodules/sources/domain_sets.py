"""The benchmarks of domain adaptation and generalization, each in the layouts that it is passed on in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from datamodules.sources.base import MissingData
from datamodules.sources.domain_files import DomainFiles, NamedRows, Protocol, folder_parts, plain, read_list
from zoo.core.errors import UserError, check_choice, suggest

_OFFICE_31 = """
    back_pack bike bike_helmet bookcase bottle calculator desk_chair desk_lamp desktop_computer file_cabinet
    headphones keyboard laptop_computer letter_tray mobile_phone monitor mouse mug paper_notebook pen phone
    printer projector punchers ring_binder ruler scissors speaker stapler tape_dispenser trash_can
"""
_OFFICE_HOME = """
    Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards Computer
    Couch Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder Fork Glasses Hammer
    Helmet Kettle Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen
    Pencil Postit_Notes Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda
    Speaker Spoon TV Table Telephone ToothBrush Toys Trash_Can Webcam
"""
_OFFICE_HOME_TLLIB = """
    Drill Exit_Sign Bottle Glasses Computer File_Cabinet Shelf Toys Sink Laptop Kettle Folder Keyboard Flipflops
    Pencil Bed Hammer ToothBrush Couch Bike Postit_Notes Mug Webcam Desk_Lamp Telephone Helmet Mouse Pen Monitor
    Mop Sneakers Notebook Backpack Alarm_Clock Push_Pin Paper_Clip Batteries Radio Fan Ruler Pan Screwdriver
    Trash_Can Printer Speaker Eraser Bucket Chair Calendar Calculator Flowers Lamp_Shade Spoon Candles Clipboards
    Scissors TV Curtains Fork Soda Table Knives Oven Refrigerator Marker
"""


@dataclass(frozen=True)
class Lists:
    """Where a set keeps its lists; ``{domain}`` stands for any spelling of the domain.

    Args:
        train: the list of the training images, or of all of them.
        test: the list of the test images; none where the first names all.
        images: folders that paths may start from.
    """

    train: str
    test: str | None = None
    images: tuple[str, ...] = ("",)


class Benchmark(DomainFiles):
    """Base of the named sets: lists where they are there, else folders.

    A subclass says where both are. Classes go by their names, which the folders that images lie in give, so that
    numbers are the same in every layout, and the same for all domains.

    Args:
        root: the folder of the set, or the one that holds it.
        domain: which one; its names are also found in other spellings.
        size: height and width images are brought to.
        protocol: see :class:`~datamodules.sources.domain_files.DomainFiles`; the published one if not given.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.
    """

    domains: ClassVar[dict[str, tuple[str, ...]]] = {}  # name → how folders and papers also call it
    within: ClassVar[tuple[str, ...]] = ()  # folders of the set below root
    lists: ClassVar[tuple[Lists, ...]] = ()
    folders: ClassVar[tuple[str, ...]] = ("{domain}",)
    names: ClassVar[tuple[str, ...]] = ()  # the classes; those that are found where there are none
    first_label: ClassVar[int] = 0  # in lists whose paths name no class
    numbered_folders: ClassVar[bool] = False  # whether folders may also be called 0, 1, .. instead of the names

    def __init__(
        self, root: str, domain: str, size: int = 224, protocol: Protocol | None = None, **kwargs: Any
    ) -> None:
        spellings = {plain(spelling): own for own, others in self.domains.items() for spelling in (own, *others)}
        own = spellings.get(plain(domain))
        if own is None:
            near = suggest(domain, self.domains)
            raise UserError(f"{type(self).__name__}: domain={domain!r} must be one of {', '.join(self.domains)}.{near}")
        super().__init__(root, own, size, protocol, **kwargs)

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names in the order of the numbers; of most sets without a look at the disk."""
        return self.names or self._ordered

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """The set's own, or alphabetical without regard to case and marks."""
        return self.names or tuple(sorted(names, key=plain))

    @property
    def _spellings(self) -> tuple[str, ...]:
        return self.domain, *self.domains[self.domain]

    def expected(self) -> Sequence[str]:
        """Lists and folders under the domain's first name."""
        lists = [f"{self.root}/{lists.train}" + (f" and {lists.test}" if lists.test else "") for lists in self.lists]
        folders = [f"{self.root}/{pattern}/{self.names[0] if self.names else 'CLASS'}/*" for pattern in self.folders]
        below = [f"(or all of this in {self.root}/{' or '.join(self.within)})"] if self.within else []
        return [line.replace("{domain}", self.domain) for line in [*folders, *lists]] + below

    def find(self) -> dict[str, NamedRows]:
        """The images of the first layout that is there."""
        for base in (Path(self.root), *(Path(self.root) / name for name in self.within)):
            if base.is_dir() and (rows := self._by_lists(base) or self._by_folders(base)):
                return rows
        raise self.missing(f"has no images of the domain {self.domain!r}")

    def _by_folders(self, base: Path) -> dict[str, NamedRows]:
        for pattern in self.folders:
            if (folder := self._existing(base, pattern)) is not None:
                known = {plain(name): name for name in self.names}
                known |= {str(number): name for number, name in enumerate(self.names) if self.numbered_folders}
                parts = folder_parts(folder)
                for path, name in (row for rows in parts.values() for row in rows if known):
                    if plain(name) not in known:
                        raise self._foreign(path, name)
                return {
                    part: [(path, known.get(plain(name), name)) for path, name in rows] for part, rows in parts.items()
                }
        return {}

    def _existing(self, base: Path, pattern: str) -> Path | None:
        """The folder of the domain in any spelling."""
        before, _, after = pattern.partition("{domain}")
        if not (base / before).is_dir():
            return None
        wanted = set(map(plain, self._spellings))
        found = (child / after.strip("/") for child in sorted((base / before).iterdir()) if plain(child.name) in wanted)
        return next((folder for folder in found if folder.is_dir()), None)

    def _by_lists(self, base: Path) -> dict[str, NamedRows]:
        # whole lists for whole domains, divided ones for divided ones, and the other kind where there is no such
        divided = self.protocol == "holdout"
        for lists in sorted(self.lists, key=lambda lists: (lists.test is not None) != divided):
            for spelling in self._spellings:
                file = base / lists.train.replace("{domain}", spelling)
                if not file.is_file():
                    continue
                files = {"train" if lists.test else "all": file}
                if lists.test:
                    files["test"] = base / lists.test.replace("{domain}", spelling)
                    if not files["test"].is_file():
                        raise MissingData(f"{self.name}: there is {file}, but no {files['test']}")
                return {part: self._read(base, lists, path) for part, path in files.items()}
        return {}

    def _read(self, base: Path, lists: Lists, file: Path) -> NamedRows:
        rows = read_list(file)
        if not rows:
            raise MissingData(f"{self.name}: {file} is empty")
        own = self._existing(base, "{domain}")
        starts = [base / start.replace("{domain}", own.name if own else self.domain) for start in lists.images]
        wanted = set(map(plain, self._spellings))

        def full(start: Path, path: str) -> Path:
            first, _, rest = path.partition("/")  # lists and folders may spell a domain differently
            if own is not None and plain(first) in wanted and first != own.name and not (start / first).is_dir():
                return start / own.name / rest
            return start / path

        start = next((start for start in starts if full(start, rows[0][0]).is_file()), starts[0])
        known = {plain(name): name for name in self.names}
        numbers: dict[str, str] = {}
        named = []
        for path, label in rows:
            folder = Path(path).parent.name
            name = known.get(plain(folder)) if known else folder
            name = name or self._numbered_class(file, path, label)
            if numbers.setdefault(label, name) != name:
                raise UserError(
                    f"{self.name}: {file} gives the label {label} to {numbers[label]!r} and, with {path!r}, to {name!r}"
                )
            named.append((str(full(start, path)), name))
        return named

    def _numbered_class(self, file: Path, path: str, label: str) -> str:
        """The class of an image whose path names none."""
        number = int(label) - self.first_label if label.isdigit() else -1
        if not self.names or not 0 <= number < len(self.names):
            raise UserError(
                f"{self.name}: {file} gives {path!r} the label {label!r}, and neither is one of the "
                f"{len(self.names)} classes"
            )
        return self.names[number]

    def _foreign(self, path: str, name: str) -> UserError:
        return UserError(
            f"{self.name}: {path!r} lies in the folder {name!r}, which is none of the {len(self.names)} classes."
            f"{suggest(name, self.names)}"
        )


class Office31(Benchmark):
    """Office-31: 4,110 photographs of 31 things of an office, 2,817 from Amazon, 498 by a camera, 795 by a webcam.

    Read as ``ROOT/amazon/images/back_pack/*.jpg``, with or without TLlib's ``image_list/amazon.txt`` or pytorch-adapt's
    ``amazon_train.txt`` and ``amazon_test.txt``, which ``protocol: holdout`` follows. Published figures are
    transductive.

    Args:
        root: the folder of the set, or the one that holds ``office31``.
        domain: ``amazon``, ``dslr`` or ``webcam`` (A, D, W).
        size: height and width images are brought to.
        protocol: ``transductive`` (published) or ``holdout``.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.

    Source: Saenko et al. 2010, "Adapting Visual Category Models to New Domains", ECCV.
    """

    domains: ClassVar[dict[str, tuple[str, ...]]] = {"amazon": ("A",), "dslr": ("D",), "webcam": ("W",)}
    within = ("office31", "office-31", "Office31")
    lists = (Lists("image_list/{domain}.txt"), Lists("{domain}_train.txt", "{domain}_test.txt"))
    folders = ("{domain}/images", "{domain}")
    names = tuple(_OFFICE_31.split())


class OfficeHome(Benchmark):
    """Office-Home: about 15,500 images of 65 things of office and home, as art, clip art, products and photographs.

    Read as ``ROOT/Art/Alarm_Clock/*.jpg``, with or without TLlib's ``image_list/Art.txt`` or pytorch-adapt's
    ``art_train.txt`` and ``art_test.txt``, which ``protocol: holdout`` follows. The fourth domain may be called ``Real
    World``, ``Real_World`` or ``real``. Published figures of adaptation are transductive.

    Folders number the classes alphabetically, TLlib's lists otherwise (Drill is 0). Here they go by name, so that both
    layouts give the numbers that ``class_order`` says.

    Args:
        root: the folder of the set, or the one that holds it.
        domain: ``Art``, ``Clipart``, ``Product`` or ``Real World`` (Ar, Cl, Pr, Rw).
        size: height and width images are brought to.
        protocol: ``transductive`` (published) or ``holdout``.
        class_order: ``alphabetical``, or ``tllib`` to go on with a network that was trained there.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.

    Source: Venkateswara et al. 2017, arXiv 1706.07522.
    """

    domains: ClassVar[dict[str, tuple[str, ...]]] = {
        "Art": ("Ar", "A"),
        "Clipart": ("Cl", "C"),
        "Product": ("Pr", "P"),
        "Real World": ("Real_World", "RealWorld", "real", "Rw", "R"),
    }
    within = ("OfficeHomeDataset_10072016", "office_home", "office-home", "officehome", "OfficeHome")
    # patterns are tried with every spelling; pytorch-adapt's are in lower case
    lists = (
        Lists("image_list/{domain}.txt"),
        Lists("{domain}_train.txt", "{domain}_test.txt"),
    )
    names = tuple(_OFFICE_HOME.split())

    def __init__(
        self,
        root: str,
        domain: str,
        size: int = 224,
        protocol: Protocol | None = None,
        class_order: Literal["alphabetical", "tllib"] = "alphabetical",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, domain, size, protocol, **kwargs)
        check_choice(self.name, "class_order", class_order, ("alphabetical", "tllib"))
        self.class_order = class_order

    @property
    def _spellings(self) -> tuple[str, ...]:
        spellings = super()._spellings
        return *spellings, *(spelling.lower() for spelling in spellings)

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names in the order asked for."""
        return self.names if self.class_order == "alphabetical" else tuple(_OFFICE_HOME_TLLIB.split())

    def _numbered_class(self, file: Path, path: str, label: str) -> str:
        raise UserError(
            f"{self.name}: {file}, {path!r} lies in no folder of a class, and a number alone does not tell the class: "
            "lists of this set differ in their order"
        )


class DomainNet(Benchmark):
    """DomainNet: about 586,000 images of 345 classes in six domains.

    Read as ``ROOT/clipart/aircraft_carrier/*.jpg`` with the official ``clipart_train.txt`` and ``clipart_test.txt``
    beside the folders or in ``image_list``; DomainBed's ``domain_net`` has none, and a share is drawn then. Published
    figures of adaptation train on the target's training list and test on its test list. Classes are those found,
    numbered as in the official lists: alphabetically without regard to case and marks.

    Args:
        root: the folder of the set, or the one that holds it.
        domain: ``clipart``, ``infograph``, ``painting``, ``quickdraw``, ``real`` or ``sketch`` (c, i, p, q, r, s).
        size: height and width images are brought to.
        protocol: ``holdout`` (published) or ``transductive``.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.

    Source: Peng et al. 2019, arXiv 1812.01754.
    """

    default_protocol: Protocol = "holdout"
    domains: ClassVar[dict[str, tuple[str, ...]]] = {
        "clipart": ("c", "clip"),
        "infograph": ("i", "info"),
        "painting": ("p", "paint"),
        "quickdraw": ("q", "quick"),
        "real": ("r",),
        "sketch": ("s",),
    }
    within = ("domainnet", "domain_net", "DomainNet")
    lists = (
        Lists("{domain}_train.txt", "{domain}_test.txt"),
        Lists("image_list/{domain}_train.txt", "image_list/{domain}_test.txt"),
    )


class DomainNet126(Benchmark):
    """The 126 classes and four domains of DomainNet with little noise, as lists of files of the whole set.

    Read from pytorch-adapt's ``clipart126_train.txt`` and ``clipart126_test.txt``, or from ``clipart_list.txt`` with
    all images, which the literature on adaptation without source data tests on.

    Args:
        root: the folder of DomainNet and the lists, or the one that holds it.
        domain: ``clipart``, ``painting``, ``real`` or ``sketch`` (c, p, r, s).
        size: height and width images are brought to.
        protocol: ``holdout``, by the divided lists, or ``transductive``.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.

    Source: Saito et al. 2019, arXiv 1904.06487, section 4.
    """

    default_protocol: Protocol = "holdout"
    domains: ClassVar[dict[str, tuple[str, ...]]] = {
        "clipart": ("c",),
        "painting": ("p",),
        "real": ("r",),
        "sketch": ("s",),
    }
    within = ("domainnet", "domain_net", "DomainNet", "domainnet126", "domainnet-126")
    lists = (
        Lists("{domain}126_train.txt", "{domain}126_test.txt"),
        Lists("image_list/{domain}126_train.txt", "image_list/{domain}126_test.txt"),
        Lists("{domain}_list.txt"),
    )
    folders = ()  # they hold all 345 classes: the lists say which are meant


class VisDA2017(Benchmark):
    """VisDA-2017: 152,397 rendered and 55,388 real images of 12 classes; 72,372 more real ones for the test.

    Read as ``ROOT/train/aeroplane/*.png`` and ``ROOT/validation/aeroplane/*.jpg``, with or without TLlib's
    ``image_list/train.txt`` or the official ``train/image_list.txt``. Published figures train on ``train`` and adapt to
    all of ``validation``, on which they report the mean accuracy of the classes.

    Args:
        root: the folder of the set, or the one that holds it.
        domain: ``train`` (synthetic), ``validation`` (real) or ``test``.
        size: height and width images are brought to.
        protocol: ``transductive`` (published) or ``holdout``.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.

    Source: Peng et al. 2017, arXiv 1710.06924.
    """

    domains: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("Synthetic",), "validation": ("Real",), "test": ()}
    within = ("visda2017", "visda-2017", "VisDA2017", "VISDA-C", "visda")
    lists = (Lists("image_list/{domain}.txt"), Lists("{domain}/image_list.txt", images=("{domain}", "")))
    names = (
        "aeroplane",
        "bicycle",
        "bus",
        "car",
        "horse",
        "knife",
        "motorcycle",
        "person",
        "plant",
        "skateboard",
        "train",
        "truck",
    )


class PACS(Benchmark):
    """PACS: 9,991 images of 7 classes as photographs, art paintings, cartoons and sketches.

    Read as DomainBed's ``ROOT/art_painting/dog/*`` (the archive's ``kfold``), with or without the official lists
    (``art_painting_train_kfold.txt``, ``_crossval_``, and ``_test_`` of all images) or TLlib's
    (``image_list/art_painting_train.txt``, ``_val``, ``_all``), whose labels are 1 to 7. Domain generalization tests on
    all images of the domain that was left out, which ``transductive`` gives; ``holdout`` follows the lists of training
    and validation.

    Args:
        root: the folder of the set, or the one that holds it.
        domain: ``art_painting``, ``cartoon``, ``photo`` or ``sketch`` (A, C, P, S).
        size: height and width images are brought to.
        protocol: ``transductive`` (published) or ``holdout``.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.

    Source: Li et al. 2017, arXiv 1710.03077.
    """

    domains: ClassVar[dict[str, tuple[str, ...]]] = {
        "art_painting": ("A", "art"),
        "cartoon": ("C",),
        "photo": ("P",),
        "sketch": ("S",),
    }
    within = ("PACS", "pacs", "kfold", "PACS/kfold")
    lists = (
        Lists("image_list/{domain}_all.txt"),
        Lists("image_list/{domain}.txt"),
        Lists("image_list/{domain}_train.txt", "image_list/{domain}_val.txt"),
        *(
            Lists(f"{folder}{{domain}}_{train}_kfold.txt", test, ("", "pacs_data", "kfold", "images"))
            for folder in ("", "pacs_label/", "splits/")
            for train, test in (("test", None), ("train", f"{folder}{{domain}}_crossval_kfold.txt"))
        ),
    )
    names = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    first_label = 1


class VLCS(Benchmark):
    """VLCS: 10,729 photographs of 5 classes from Caltech-101, LabelMe, SUN09 and PASCAL VOC 2007.

    Read as DomainBed's ``ROOT/VOC2007/bird/*``, or as ``ROOT/PASCAL/train/0/*`` with ``crossval`` and ``test`` beside
    ``train``, which ``protocol: holdout`` follows (DASSL and others; 0 to 4 are the classes in alphabetical order).

    Args:
        root: the folder of the set, or the one that holds ``VLCS``.
        domain: ``Caltech101``, ``LabelMe``, ``SUN09`` or ``VOC2007`` (C, L, S, V).
        size: height and width images are brought to.
        protocol: ``transductive``, all images as the test set as is usual in generalization, or ``holdout``.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.

    Source: Fang et al. 2013, "Unbiased Metric Learning", ICCV.
    """

    domains: ClassVar[dict[str, tuple[str, ...]]] = {
        "Caltech101": ("C", "CALTECH"),
        "LabelMe": ("L",),
        "SUN09": ("S", "SUN"),
        "VOC2007": ("V", "PASCAL", "VOC"),
    }
    within = ("VLCS", "vlcs")
    numbered_folders = True
    names = ("bird", "car", "chair", "dog", "person")


class TerraIncognita(Benchmark):
    """Terra Incognita: 24,788 pictures of 10 classes from camera traps at four places, as DomainBed chooses them.

    Read as ``ROOT/location_38/bird/*``.

    Args:
        root: the folder of the set, or the one that holds ``terra_incognita``.
        domain: ``location_100``, ``location_38``, ``location_43`` or ``location_46`` (L100, L38, L43, L46).
        size: height and width images are brought to.
        protocol: ``transductive``, all images as the test set as is usual in generalization, or ``holdout``.
        **kwargs: see :class:`~datamodules.sources.domain_files.DomainFiles`.

    Source: Beery et al. 2018, arXiv 1807.04975.
    """

    domains: ClassVar[dict[str, tuple[str, ...]]] = {
        f"location_{number}": (f"L{number}", str(number)) for number in (100, 38, 43, 46)
    }
    within = ("terra_incognita", "TerraIncognita")
    names = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
