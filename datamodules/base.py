"""What every regime shares: loading a source, splitting it, loaders, and views made on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader, rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.samplers import EvalSampler, Loader, RepeatSampler, mix
from datamodules.sources.base import FileSamples, MissingData, Samples, Source, list_images
from datamodules.splits import Split, counts, generator, labeled_per_class, proportional, stratified
from datamodules.transforms import Normalize, View
from zoo.core.errors import UserError, suggest

VAL, LABELED, HALVES, UNLABELED = 1, 2, 4, 5  # purposes of random streams: changing one draw leaves the others alone


@dataclass
class Role:
    """One role of a training batch: its samples and what a method sees of them.

    Args:
        samples: the set.
        batch_size: samples per process and step.
        views: key in the batch to the view that makes it from the image.
        aliases: further keys for the same tensors: new key to key.
        hidden: labels are handed over as ``hidden_label`` only.
    """

    samples: Samples
    batch_size: int
    views: dict[str, View]
    aliases: dict[str, str] = field(default_factory=dict)
    hidden: bool = False


class _RoleSet(Dataset):
    """A role's samples as a loader hands them over: uint8 images, or views made here one sample at a time."""

    def __init__(self, role: Role, per_sample: bool) -> None:
        self.role = role
        self.makers = {key: view.per_sample() for key, view in role.views.items()} if per_sample else None

    def __len__(self) -> int:
        return len(self.role.samples)

    def __getitem__(self, draw: Any) -> dict[str, Any]:
        batch: dict[str, Any] = self.role.samples[draw]
        if self.role.hidden:
            batch["hidden_label"] = batch.pop("label")
        seed = getattr(draw, "seed", 0)
        if self.makers is None:
            batch["seed"] = seed  # views are made on the device, from this seed
            return batch
        images = batch.pop("image")
        with seeded(seed):
            for key, make in self.makers.items():
                batch[key] = torch.stack([make(image) for image in images])
        return batch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Views drawn from their own seed: equal after a resume, and nobody else's random numbers move."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reset the devices as well
        yield


class Data(LightningDataModule):
    """A source under a regime. Subclasses say which roles a training batch has.

    Args:
        source: where samples come from.
        batch_size: labelled samples per process and step.
        steps: optimizer steps of an epoch, whatever the size of the set.
        eval_batch_size: samples per process and step in validation, test and prediction.
        val_size: labelled samples held out of the training set for validation: a number, or a share of it.
        weak: the weak view; by default a shift, with a mirror where the source allows.
        num_workers: processes that read ahead; 0 is fastest for sources in memory.
        seed: of splits, orders and views.
        split: a split.json of an earlier run, to use the same samples.
        allow_repeats: accept labelled sets smaller than a batch (samples then occur several times in it).
        views_in_workers: make views one sample at a time in the workers rather than batched on the device; by
            default for sources that stream from files when there are workers.
        predict_folder: predict on all images below this folder instead of the test set.
        pin_memory: page-locked batches, with workers and a GPU.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 64,
        steps: int = 100,
        eval_batch_size: int = 256,
        val_size: int | float = 0.1,
        weak: View | None = None,
        num_workers: int = 0,
        seed: int = 0,
        split: str | None = None,
        allow_repeats: bool = False,
        views_in_workers: bool | None = None,
        predict_folder: str | None = None,
        pin_memory: bool = True,
    ) -> None:
        super().__init__()
        self.source = source
        for name, value in (("batch_size", batch_size), ("steps", steps), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise UserError(f"{self._owner}: {name}={value} must be at least 1")
        if val_size < 0 or (isinstance(val_size, float) and val_size >= 1):
            raise UserError(f"{self._owner}: val_size={val_size} must be a number of samples or a share below 1")
        self.batch_size = batch_size
        self.steps = steps
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.weak = weak
        self.num_workers = num_workers
        self.seed = seed
        self.split_path = split
        self.allow_repeats = allow_repeats
        self.views_in_workers = views_in_workers
        self.predict_folder = predict_folder
        self.pin_memory = pin_memory
        self.predict_paths: list[str] = []
        self.split: Split | None = None
        self._loaded: dict[str, Samples] = {}
        self._roles: dict[str, Role] = {}
        self._normalize: Normalize | None = None

    # What a method and the command line ask for ----------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes: known at once, without reading the data."""
        return self.source.num_classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return self.source.classes

    @property
    def channels(self) -> int:
        """Channels of the images handed over."""
        return self.source.channels

    @property
    def size(self) -> int:
        """Height and width of the images handed over."""
        return self.source.size

    @property
    def roles(self) -> dict[str, Role]:
        """The roles of a training batch; after ``setup("fit")``."""
        if not self._roles:
            raise RuntimeError(f"{self._owner}: call setup('fit') before asking for roles")
        return self._roles

    # To be said by a regime ------------------------------------------------------------------------------------------

    @abstractmethod
    def make_split(self, labels: Tensor) -> Split:
        """Divide the training set: at least the parts that :meth:`make_roles` uses, and ``val``."""

    @abstractmethod
    def make_roles(self) -> dict[str, Role]:
        """The roles of a training batch, from ``self.split``."""

    def evaluation_sets(self, stage: str) -> dict[str, Samples]:
        """Name to samples for ``val`` or ``test``."""
        if stage == "test":
            return {"test": self._test(self.source)}
        held = self._train(self.source).subset(self.parts["val"])
        return {"val": held} if len(held) else {}

    def prediction_set(self) -> Samples:
        """The samples that ``predict`` goes through when there is no ``predict_folder``."""
        return self._test(self.source)

    @property
    def predicts(self) -> str:
        """Whose numbers ``index`` has in ``predict``: ``train``, ``test`` or ``folder``."""
        return "test" if self.predict_folder is None else "folder"

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check or fetch the data, once per machine."""
        for source in self._sources():
            source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs; a second call does nothing."""
        if stage in (None, "fit", "validate"):
            self._divide()
        if stage in (None, "fit") and not self._roles:
            self._roles = self.make_roles()
            for name, role in self._roles.items():
                self._check_batch(name, role)
            self._check_labels()
            self._write_split()

    def train_dataloader(self) -> CombinedLoader:
        """One loader per role, all of ``steps`` batches."""
        self._check_network()
        loaders = {}
        for number, (name, role) in enumerate(self.roles.items()):
            loaders[name] = self._loader(_RoleSet(role, self._in_workers(role)), self.make_sampler(number, role))
        return CombinedLoader(loaders, "min_size")

    def make_sampler(self, number: int, role: Role) -> RepeatSampler:
        """The order in which a role's samples come; ``number`` is the role's own stream of random numbers."""
        return RepeatSampler(role.samples, role.batch_size, self.steps, seed=mix(self.seed, number), **self._replicas())

    def val_dataloader(self) -> Any:
        """Loaders by name; none when nothing is held out."""
        return self._evaluation_loaders(self.evaluation_sets("val")) or []

    def test_dataloader(self) -> Any:
        """Loaders by name.

        Raises:
            UserError: when no test sample has a label.
        """
        sets = self.evaluation_sets("test")
        for name, samples in sets.items():
            if not samples.columns and len(samples) and bool((samples.labels < 0).all()):
                raise UserError(
                    f"{self._owner}: no sample of {name!r} has a label, so nothing can be measured; predict"
                )
        return self._evaluation_loaders(sets)

    def predict_dataloader(self) -> Any:
        """The prediction set in order, or every image below ``predict_folder``."""
        samples = self.prediction_set() if self.predict_folder is None else self._folder(self.predict_folder)
        if isinstance(samples, FileSamples):
            self.predict_paths = list(samples.paths)
        return self._evaluation_loaders({"predict": samples})["predict"]

    def state_dict(self) -> dict[str, Any]:
        """Which vocabulary ids belong to; nothing for images."""
        tokenizer = getattr(self.source, "tokenizer", None)
        return {} if tokenizer is None else {"vocabulary": tokenizer.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that ids still mean the words that they meant in training."""
        tokenizer, then = getattr(self.source, "tokenizer", None), state_dict.get("vocabulary")
        if tokenizer is not None and then is not None and tokenizer.fingerprint != then:
            raise UserError(
                f"{self._owner}: the checkpoint was trained with another vocabulary than {self.source.name} has now: "
                "its texts, or vocabulary or tokenizer, have changed. The run's folder holds the vocabulary it was "
                "trained with: data.source.tokenizer: RUN/tokenizer.json"
            )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the device: views for training batches, then normalised floats."""
        if "image" in batch and isinstance(batch["image"], Tensor):
            batch.pop("seed", None)
            return {**batch, "image": self._as_floats(batch["image"])}
        return {name: self._finish(self.roles[name], role) for name, role in batch.items()}

    # Details ---------------------------------------------------------------------------------------------------------

    @property
    def _owner(self) -> str:
        return type(self).__name__

    @property
    def parts(self) -> Split:
        """The split; drawn when first needed."""
        return self._divide()

    def _sources(self) -> list[Source]:
        return [self.source]

    def _train(self, source: Source) -> Samples:
        return self._load(source, "train")

    def _test(self, source: Source) -> Samples:
        return self._load(source, "test")

    def _load(self, source: Source, part: str) -> Samples:
        key = f"{part} {id(source)}"
        if key not in self._loaded:
            samples = source.train() if part == "train" else source.test()
            counts(samples.labels, source.num_classes, f"{self._owner}: {source.name} ({part})")
            self._loaded[key] = samples
        return self._loaded[key]

    def _divide(self) -> Split:
        if self.split is None:
            labels = self._train(self.source).labels
            if self.split_path is None:
                self.split = self.make_split(labels)
            else:
                self.split = Split.load(self.split_path)
                if self.split.size != len(labels) or self.split.source != self.source.name:
                    raise UserError(
                        f"{self._owner}: split={self.split_path!r} divides {self.split.size} samples of "
                        f"{self.split.source}, but {self.source.name} has {len(labels)}"
                    )
                self._compare_counts(self.split)
        return self.split

    def _compare_counts(self, split: Split) -> None:
        """A split that was read decides; what was asked for beside it must not say something else."""
        per_class, total = getattr(self, "labels_per_class", None), getattr(self, "num_labels", None)
        wanted = total if per_class is None else per_class * self.num_classes
        labeled = split.parts.get("labeled")
        if wanted is None or labeled is None or getattr(self, "imbalance", None) is not None:
            return
        if len(labeled) != wanted:
            asked = f"num_labels={total}" if per_class is None else f"labels_per_class={per_class}"
            raise UserError(
                f"{self._owner}: split={self.split_path!r} has {len(labeled)} labelled samples, but {asked} asks for "
                f"{wanted}; leave one of the two out"
            )

    def hold_out(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Validation samples, stratified in proportion to the classes: (rest, held out), sorted indices."""
        total = self.val_size if isinstance(self.val_size, int) else round(self.val_size * len(labels))
        available = counts(labels, self.num_classes, self._owner)
        if total >= int(available.sum()):
            raise UserError(
                f"{self._owner}: val_size={self.val_size} leaves nothing of {int(available.sum())} labelled samples"
            )
        held = stratified(labels, proportional(available, total), generator(self.seed, VAL))
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[held] = False
        return rest.nonzero().flatten(), held

    def choose_labeled(
        self,
        labels: Tensor,
        among: Tensor,
        labels_per_class: int | None,
        num_labels: int | None,
        labeled_fraction: float | None,
        imbalance: float | None = None,
    ) -> Tensor:
        """The labelled samples among these, sorted: the same for every regime that has the same seed."""
        if num_labels is not None and 0 < num_labels < self.num_classes:
            raise UserError(
                f"{self._owner}: num_labels={num_labels} must be at least {self.num_classes}, one for each class: a "
                "class without any label cannot be learnt"
            )
        pool = labels[among]
        wanted = labeled_per_class(
            counts(pool, self.num_classes, self._owner),
            self.num_classes,
            self.seed,
            labels_per_class,
            num_labels,
            labeled_fraction,
            owner=self._owner,
            classes=self.classes,
            imbalance=imbalance,
        )
        if wanted is None:
            return among[pool >= 0]
        return among[stratified(pool, wanted, generator(self.seed, LABELED))]

    def default_weak(self, source: Source) -> View:
        """The weak view that was asked for, or the source's."""
        return self._ready("weak", source.weak_view() if self.weak is None else self.weak, source)

    def default_strong(self, strong: View | None, source: Source) -> View:
        """The strong view that was asked for, or the source's."""
        return self._ready("strong", source.strong_view() if strong is None else strong, source)

    def views_of(self, role: str, default: tuple[str, ...], strong: View | None, source: Source) -> dict[str, View]:
        """The views that the method in training names in ``<role>_views``: every one has its own draw.

        Args:
            role: of the batch.
            default: for methods that name none.
            strong: the strong view that was asked for.
            source: whose own views take the place of those that were not asked for.

        Raises:
            UserError: for a name that is none.
        """
        method = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        names = getattr(method, f"{role}_views", default)
        kinds = {
            "image": self.default_weak(source),
            "weak": self.default_weak(source),
            "strong": self.default_strong(strong, source),
        }
        unknown = [name for name in names if name.partition("_")[0] not in kinds]
        if unknown:
            raise UserError(
                f"{type(method).__name__}: {role}_views names {unknown[0]!r}; a view is one of {', '.join(kinds)}, "
                "with a number where several are wanted, such as 'strong_2'"
            )
        return {name: kinds[name.partition("_")[0]] for name in names}

    def _ready(self, argument: str, view: View, source: Source) -> View:
        """The view, told what it must know of the source."""
        if view.modality not in (None, source.modality):
            raise UserError(
                f"{self._owner}: {argument}={type(view).__name__} is a view of {view.modality}s, but {source.name} has "
                f"{source.modality}s"
            )
        view.prepare(source)
        return view

    def _check_batch(self, name: str, role: Role) -> None:
        if len(role.samples) == 0:
            raise UserError(f"{self._owner}: no samples are left for the role {name!r}")
        if role.batch_size > len(role.samples) and not self.allow_repeats:
            raise UserError(
                f"{self._owner}: a batch of {role.batch_size} is larger than the {len(role.samples)} samples of the "
                f"role {name!r}. At most {len(role.samples)}, or allow_repeats: true to see samples twice in a step"
            )

    def _check_labels(self) -> None:
        """Every class needs a labelled sample: otherwise nothing could ever be of it, and nothing would say so."""
        role = self._roles.get("labeled")
        if role is None or role.hidden:
            return
        empty = (counts(role.samples.labels, self.num_classes, self._owner) == 0).nonzero().flatten().tolist()
        if empty:
            names = ", ".join(f"{label} ({self.classes[label]})" for label in empty[:5])
            raise UserError(
                f"{self._owner}: {len(empty)} of {self.num_classes} classes have no labelled sample: {names}"
                f"{' ...' if len(empty) > 5 else ''}"
            )

    def _check_network(self) -> None:
        """Before the first batch: whether the network takes what the source has."""
        method = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        backbone = getattr(getattr(method, "network", None), "backbone", None)
        if backbone is None or not hasattr(backbone, "vocabulary"):
            return
        source, is_text = self.source, self.source.modality == "text"
        if is_text != (backbone.in_channels is None):
            wanted, other = (
                ("text_cnn, bag_of_words or hf:NAME", "images") if is_text else ("an image network", "texts")
            )
            raise UserError(
                f"{self._owner}: {source.name} has {source.modality}s, but the network's backbone takes {other}; "
                f"take {wanted}"
            )
        tokenizer = getattr(source, "tokenizer", None)
        if tokenizer is None:
            return
        if backbone.vocabulary is not None and backbone.vocabulary < tokenizer.size:
            raise UserError(
                f"{self._owner}: {source.name} has {tokenizer.size} token ids, but the network's vocabulary is "
                f"{backbone.vocabulary}; make it at least {tokenizer.size}, or the source's vocabulary at most "
                f"{backbone.vocabulary}"
            )
        if backbone.pad != tokenizer.pad:
            raise UserError(
                f"{self._owner}: {source.name} fills rows up with id {tokenizer.pad}, but the network's padding is "
                f"{backbone.pad}; for a pretrained network, take its tokenizer: hf:NAME"
            )

    def _write_split(self) -> None:
        trainer = self.trainer
        if trainer is None or self.split is None or getattr(trainer, "fast_dev_run", False):
            return
        folder = trainer.log_dir  # on all ranks: it is a collective
        own = trainer.logger is not None and trainer.logger.log_dir is not None
        # Without a folder of its own a run is somewhere in the user's: nothing is left behind there.
        if folder is not None and (own or Path(folder).resolve() != Path.cwd()):
            _save(self.split, Path(folder) / "split.json")
            if (tokenizer := getattr(self.source, "tokenizer", None)) is not None:
                rank_zero_only(tokenizer.save)(Path(folder) / "tokenizer.json")

    def _replicas(self) -> dict[str, int]:
        """Number of data-parallel processes and which one this is; fewer than all under tensor parallelism."""
        kwargs = getattr(self.trainer, "distributed_sampler_kwargs", None) if self.trainer is not None else None
        return {key: int(value) for key, value in (kwargs or {}).items() if key in ("num_replicas", "rank")}

    def _in_workers(self, role: Role) -> bool:
        if self.views_in_workers is None:
            return not role.samples.in_memory and self.num_workers > 0
        return self.views_in_workers

    def _loader(self, dataset: Dataset, sampler: RepeatSampler | EvalSampler) -> Loader:
        return Loader(dataset, sampler, self.num_workers, self.pin_memory)

    def _evaluation_loaders(self, sets: dict[str, Samples]) -> dict[str, Loader]:
        self._check_network()
        return {
            name: self._loader(samples, EvalSampler(samples, self.eval_batch_size, **self._replicas()))
            for name, samples in sets.items()
        }

    def _folder(self, name: str) -> Samples:
        if self.source.modality != "image":
            raise UserError(
                f"{self._owner}: predict_folder reads images, but {self.source.name} has {self.source.modality}s; "
                "give new ones as the test file, without labels"
            )
        folder = Path(name)
        if not folder.is_dir():
            raise MissingData(f"{self._owner}: predict_folder={name!r} ({folder.resolve()}) is no folder")
        paths = [str(path) for path in list_images(folder)]
        if not paths:
            raise MissingData(f"{self._owner}: predict_folder={name!r} ({folder.resolve()}) holds no images")
        return FileSamples(paths, torch.full((len(paths),), -1), self.size, self.channels)

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel of what is handed over."""
        return self.source.mean, self.source.std

    def _as_floats(self, images: Tensor) -> Tensor:
        if self.source.modality == "text":  # ids are handed over as they are
            return images
        if self._normalize is None:
            self._normalize = Normalize(*self._statistics())
        if next(iter(self._normalize.buffers()), images).device != images.device:
            self._normalize.to(images.device)
        # Lightning has converted batches for bf16-true and 64-true before there was anything to convert.
        plugin = getattr(self.trainer, "precision_plugin", None)
        made: Tensor = self._normalize(images)
        return made if plugin is None else plugin.convert_input(made)

    def _finish(self, role: Role, raw: dict[str, Any]) -> dict[str, Tensor]:
        made = dict(raw)
        if "seed" in made:
            seed, images = made.pop("seed"), made.pop("image")
            with seeded(seed), torch.no_grad():
                for key, view in role.views.items():
                    made[key] = view(images)
        for key in role.views:
            made[key] = self._as_floats(made[key])
        for alias, key in role.aliases.items():
            made[alias] = made[key]
        return made


@rank_zero_only
def _save(split: Split, path: Path) -> None:
    split.save(path)


def find_source(name: str, **arguments: Any) -> Source:
    """A source by its short name: ``find_source("FashionMNIST", root="data")``.

    Raises:
        UserError: when there is none of that name; the message names the nearest.
    """
    known = {cls.__name__: cls for cls in _descendants(Source) if not cls.__name__.startswith("_")}
    if name not in known:
        raise UserError(f"unknown source {name!r}.{suggest(name, known)} Known: {', '.join(sorted(known))}")
    return known[name](**arguments)


def _descendants(base: type) -> list[type]:
    found: list[type] = []
    children: list[type] = type.__subclasses__(base)
    for cls in children:
        found += [cls, *_descendants(cls)]
    return found
