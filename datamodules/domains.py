"""Labels in one or several source domains, and none in the target or no target at all."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.base import VAL, Role
from datamodules.pseudo_labels import PseudoLabels
from datamodules.samplers import DomainSampler, RepeatSampler, mix
from datamodules.semi_supervised import join
from datamodules.sources.base import FileSamples, Samples, Source, TensorSamples
from datamodules.sources.text import TextSource
from datamodules.sources.wrapped import WrappedSource, relabeled
from datamodules.splits import Split, counts, generator, proportional, stratified
from datamodules.tokenizer import build
from datamodules.transforms import Channels, View
from zoo.core.errors import UserError, suggest

SETTINGS = ("closed", "partial", "open", "universal")
UNKNOWN = ("open", "universal")  # those in which the target has classes that the source has not


class DomainData(PseudoLabels):
    """Labelled images of source domains and unlabelled ones of a target domain.

    Target images are brought to the size and channels of the (first) source, and normalised like it. Domains are
    numbered: 0 .. S-1 the S sources, S the target, from S+1 on further test domains.

    Classes are compared by their names, and numbered as in the first source. Only what sources say of themselves is
    compared, never the labels of the target, and a target without classes has the source's. In which relation they
    stand is the ``setting``:

    - ``closed``: the same classes in every domain;
    - ``partial``: the target has only some of the source's;
    - ``open``: the target has classes that the source has not. In ``oracle`` and ``test`` they are one class, the
      unknown, with the number C, the number of the source's classes; what is then measured is
      :class:`~zoo.core.open_set.OpenSetAccuracy`;
    - ``universal``: some classes are common, and both the source and the target have others. The target's are unknown,
      as in ``open``.

    A method says in ``settings`` for which of them it is made (``("closed",)`` unless it says so), and meets no other.
    :class:`~datamodules.sources.KnownClasses` makes either setting of a set with the same classes everywhere.

    Texts: where the vocabularies of the domains would differ, they get one, built of the training texts of source and
    target.

    Batch: ``source`` {image, label, domain, index}, ``target`` {image, weak, strong, domain, index, hidden_label,
    pseudo_label, pseudo_label_weight, has_pseudo_label}, or other views where the method names them in ``source_views``
    and ``target_views``: what no method looks at is not made. The last three are what a ``PseudoLabeler`` among the
    callbacks last gave, where there is one, see :class:`~datamodules.pseudo_labels.PseudoLabels`. Validation: ``val``,
    held-out labelled source samples, on which a model may be selected, and ``oracle``, held-out target samples, whose
    labels a real user would not have. Test: ``test``, the target's test set.

    A method with ``source_views = ()`` learns without the source: nothing of it is then checked, fetched or loaded,
    there is no role ``source`` and no ``val``. What is said of the source, its size, normalisation and classes, still
    counts; the classes of folders that are not there have to be given, ``classes: [...]``.

    Args:
        source: the labelled domain, or a list of them.
        target: the unlabelled domain.
        batch_size: source samples per process and step, together over all sources.
        target_ratio: target samples per source sample.
        strong: the strong view; by default RandAugment and cutout, restricted for digits.
        size: height and width of all images; the first source's if not given.
        channels: 1 or 3; the first source's if not given.
        setting: ``closed``, ``partial``, ``open`` or ``universal``.
        align_classes: number the classes of all domains as in the first source where their order differs, instead of
            refusing to start.
        target_val_size: target samples held out for ``oracle``: a number, or a share; ``val_size`` if not given. With
            0, all are learnt from, as in published transductive figures.
        unknown_threshold: in the settings ``open`` and ``universal``, a network of C outputs calls a sample unknown
            whose largest probability is below this (0.8 in TLlib's baselines); one of C + 1 outputs has its own for
            that.
        tests: further test domains by name, measured as ``test/NAME``.
        **kwargs: see :class:`~datamodules.base.Data`.

    Raises:
        UserError: when classes do not stand in the relation that ``setting`` says, or not in the same order; for a
            domain without samples; for a method that is not made for the setting.
    """

    def __init__(
        self,
        source: Source | list[Source],
        target: Source,
        batch_size: int = 32,
        target_ratio: int = 1,
        strong: View | None = None,
        size: int | None = None,
        channels: int | None = None,
        setting: Literal["closed", "partial", "open", "universal"] = "closed",
        align_classes: bool = False,
        target_val_size: int | float | None = None,
        unknown_threshold: float | None = None,
        tests: dict[str, Source] | None = None,
        **kwargs: Any,
    ) -> None:
        sources = list(source) if isinstance(source, Sequence) else [source]
        if not sources:
            raise UserError("DomainData: source is an empty list")
        super().__init__(sources[0], batch_size, **kwargs)
        if target_ratio < 1:
            raise UserError(f"DomainData: target_ratio={target_ratio} must be at least 1")
        if channels not in (None, 1, 3):
            raise UserError(f"DomainData: channels={channels} must be 1 or 3")
        if setting not in SETTINGS:
            raise UserError(
                f"DomainData: setting={setting!r} must be one of {', '.join(SETTINGS)}.{suggest(setting, SETTINGS)}"
            )
        if target_val_size is not None and (
            target_val_size < 0 or (isinstance(target_val_size, float) and target_val_size >= 1)
        ):
            raise UserError(
                f"DomainData: target_val_size={target_val_size} must be a number of samples or a share below 1"
            )
        if unknown_threshold is not None and (setting not in UNKNOWN or not 0 <= unknown_threshold <= 1):
            raise UserError(
                f"DomainData: unknown_threshold={unknown_threshold} must be in 0..1, and goes with setting: open or "
                "universal"
            )
        if wrong := [name for name in tests or {} if not name or "/" in name]:
            raise UserError(f"DomainData: tests names a domain {wrong[0]!r}; a name is not empty and has no slash")
        self.sources = sources
        self.target = target
        self.target_ratio = target_ratio
        self.strong = strong
        self._size = size
        self._channels = channels
        self.setting = setting
        self.align_classes = align_classes
        self.target_val_size = target_val_size
        self.unknown_threshold = unknown_threshold
        self.tests = dict(tests or {})

    @property
    def size(self) -> int:
        """Height and width of the images of every domain."""
        return self._size if self._size is not None else self.source.size

    @property
    def channels(self) -> int:
        """Channels of the images of every domain."""
        return self._channels if self._channels is not None else self.source.channels

    @property
    def num_domains(self) -> int:
        """Number of source domains."""
        return len(self.sources)

    @property
    def pseudo_label_role(self) -> str | None:
        """``target``."""
        return "target"

    @property
    def source_free(self) -> bool:
        """Whether the method at hand must not see the source."""
        method = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        return getattr(method, "source_views", None) == ()

    def _sources(self) -> list[Source]:
        return [*self.sources, self.target]

    @property
    def _strictest(self) -> Source:
        """Whose views all have: one domain whose classes do not survive a mirror decides for all."""
        return next((source for source in self._sources() if not source.flip), self.source)

    @property
    def _everywhere(self) -> list[Source]:
        """The domains in the order of their numbers."""
        return [*self._sources(), *self.tests.values()]

    def prepare_data(self) -> None:
        """Check or fetch the data of every domain, then compare their classes."""
        for source in self._everywhere[self.num_domains if self.source_free else 0 :]:
            source.prepare()
        self._compare_classes()

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs, and take up the views of the method that is to be trained now."""
        self._check_method()
        self._compare_classes()
        self._share_vocabulary()
        if stage in (None, "fit") and self._roles and ("source" in self._roles) == self.source_free:
            self.split, self._roles = None, {}  # it has served a method of the other kind
        super().setup(stage)
        if stage in (None, "fit"):
            for name, default in (("source", ("image",)), ("target", ("weak", "strong"))):
                if name in self._roles:
                    views = self.views_of(name, default, self.strong, self._strictest)
                    self._roles[name].views = views
                    self._roles[name].aliases = {"image": "weak"} if "weak" in views and "image" not in views else {}

    def _check_method(self) -> None:
        """Whether the method at hand is made for this setting."""
        method = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        settings = getattr(method, "settings", ("closed",))
        if method is not None and self.setting not in settings:
            raise UserError(
                f"{type(method).__name__} is made for the setting {' and '.join(map(repr, settings))}, not for "
                f"{self.setting!r}, where source and target differ in their classes. Take a method whose `settings` "
                "name it; SourceOnly is the baseline"
            )

    def _compare_classes(self) -> None:
        if not self.num_classes:
            raise UserError(f"DomainData: {self.source.name} has no classes; a source needs labels")
        for other in self._everywhere[1:]:
            if other.modality != self.source.modality:
                raise UserError(
                    f"DomainData: {self.source.name} has {self.source.modality}s, but {other.name} has "
                    f"{other.modality}s; all domains need the same kind of samples"
                )
            if other.modality == "text" and other.size != self.source.size:
                raise UserError(
                    f"DomainData: {self.source.name} has texts of max_length={self.source.size}, but {other.name} of "
                    f"{other.size}; all domains need the same length"
                )
            self._numbers_of(other)
        mine, theirs = set(self.classes), set(self.target.classes)
        if self.setting in UNKNOWN and theirs and theirs <= mine:
            raise UserError(
                f"DomainData: in the setting {self.setting!r} the target has further classes, but all of "
                f"{self.target.name} are classes of {self.source.name}"
            )
        if self.setting == "universal" and theirs and (mine <= theirs or not mine & theirs):
            few = "all" if mine <= theirs else "none"
            raise UserError(
                f"DomainData: in the setting 'universal' some classes of the source are the target's, but {few} of "
                f"{self.source.name} are classes of {self.target.name}"
            )
        if self.num_classes == 1 or len(self.target.classes) == 1:
            one = self.source if self.num_classes == 1 else self.target
            warnings.warn(f"DomainData: {one.name} has one class only, {one.classes[0]!r}", stacklevel=2)

    def _numbers_of(self, other: Source) -> Tensor | None:
        """The numbers that classes of another domain have here, the number of the unknown class among them.

        None where they are its own.
        """
        mine, theirs = self.classes, other.classes
        is_source = any(other is source for source in self.sources)
        setting = "closed" if is_source else self.setting
        if theirs == mine or (not theirs and not is_source):
            return None
        unnamed = tuple(str(label) for label in range(self.num_classes))
        if setting == "closed" and len(mine) == len(theirs) and unnamed in (mine, theirs):
            return None  # numbers go with any names
        lacking = [name for name in mine if name not in theirs]
        further = [name for name in theirs if name not in mine]
        if setting == "closed" and (lacking or further):
            raise self._other_classes(other, lacking, further, is_source)
        if setting == "partial" and further:
            raise UserError(
                f"DomainData: in the setting 'partial' all classes of the target are the source's, but {other.name} "
                f"has also {_few(further)}, which {self.source.name} has not.{suggest(further[0], mine)}"
            )
        if setting == "open" and lacking:
            raise UserError(
                f"DomainData: in the setting 'open' all classes of the source are the target's, but {self.source.name} "
                f"has also {_few(lacking)}, which {other.name} has not.{suggest(lacking[0], theirs)}"
            )
        shared = [name for name in theirs if name in mine]
        if not self.align_classes and setting == "closed":
            label = next(number for number, name in enumerate(shared) if name != mine[number])
            raise UserError(
                f"DomainData: class {label} is {mine[label]!r} in {self.source.name}, but {theirs[label]!r} in "
                f"{other.name}: the same classes in another order. With align_classes: true those of {other.name} are "
                "renumbered by their names"
            )
        numbers = {name: number for number, name in enumerate(mine)}
        return torch.tensor([numbers.get(name, len(mine)) for name in theirs])

    def _other_classes(self, other: Source, lacking: list[str], further: list[str], is_source: bool) -> UserError:
        """The error for sets of classes that differ, with the setting that they have."""
        what = [f"{other.name} lacks {_few(lacking)}"] if lacking else []
        what += [f"{self.source.name} lacks {_few(further)}"] if further else []
        advice = ""
        if not is_source and not (lacking and further):
            setting = "partial" if lacking else "open"
            advice = f"; if that is meant, setting: {setting}, and a method that is made for it"
        near = suggest(lacking[0], further) if lacking else ""
        return UserError(
            f"DomainData: {self.source.name} has {self.num_classes} classes, but {other.name} has "
            f"{other.num_classes}, and all domains need the same classes: {'; '.join(what)}{advice}.{near}"
            if self.num_classes != other.num_classes
            else f"DomainData: all domains need the same classes, but {'; '.join(what)}{advice}.{near}"
        )

    def _vocabulary_domains(self) -> list[Source]:
        """Those whose training texts a common vocabulary may be built of."""
        return self._sources()

    def _share_vocabulary(self) -> None:
        """Give texts one vocabulary where those of the domains would differ."""
        if self.source.modality != "text":
            return
        domains: list[Any] = [domain for s in self._everywhere if hasattr(domain := _innermost(s), "tokenizer")]
        strangers = [d for d in domains if d.tokenizer.fingerprint != domains[0].tokenizer.fingerprint]
        if not strangers:
            return
        texts = [domain for domain in domains if isinstance(domain, TextSource) and domain.builds_vocabulary]
        if len(texts) < len(domains) or len({(text.tokenizer_name, text.vocabulary) for text in texts}) > 1:
            raise UserError(
                f"DomainData: {domains[0].name} and {strangers[0].name} have different vocabularies, so that an id is "
                "another word in each; give all domains the same tokenizer: a file or hf:NAME, or 'words' or 'bpe' of "
                "one size, which are then built of the texts of all"
            )
        readers = [_innermost(source) for source in self._vocabulary_domains()]
        distinct = {id(reader): reader for reader in readers if isinstance(reader, TextSource)}.values()
        training = [text for reader in distinct for text in reader.training_texts(reader.read())]
        tokenizer = build(training, texts[0].tokenizer_name, texts[0].vocabulary)
        for domain in texts:
            domain.share(tokenizer)

    def _load(self, source: Source, part: str) -> Samples:
        key = f"{part} {id(source)}"
        if key not in self._loaded:
            domain = next(number for number, other in enumerate(self._everywhere) if other is source)
            samples = super()._load(source, part) if source.classes else self._unlabeled(source, part)
            if not len(samples):
                raise UserError(f"DomainData: {source.name} has no {part} samples")
            if (numbers := self._numbers_of(source)) is not None:
                samples = relabeled(samples, torch.cat([numbers, torch.tensor([-1])])[samples.labels])  # -1 stays
            samples = adapt(samples, self.size, self.channels)
            self._loaded[key] = samples.with_columns(domain=torch.full((len(samples),), domain))
        return self._loaded[key]

    def _unlabeled(self, source: Source, part: str) -> Samples:
        """A domain that names no classes, and has no labels then."""
        samples = source.train() if part == "train" else source.test()
        if bool((samples.labels >= 0).any()):
            raise UserError(f"DomainData: {source.name} has labels, but no classes")
        return samples

    def make_split(self, labels: Tensor) -> Split:
        """Validation of every domain: parts ``val 0`` .. of the sources, ``oracle`` of the target."""
        parts: dict[str, Tensor] = {}
        for number, source in enumerate([] if self.source_free else self.sources):
            domain = self._train(source).labels
            rest, held = self._hold_out_of(domain, number)
            if not len(rest) or not bool((domain >= 0).any()):
                raise UserError(f"DomainData: {source.name} has no labelled samples to learn from")
            parts[f"source {number}"], parts[f"val {number}"] = rest[domain[rest] >= 0], held
        target = self._train(self.target).labels
        parts["target"], parts["oracle"] = self._hold_out_of(target, len(self.sources), stratify=False)
        return Split(parts, len(labels), self.seed, self.source.name, {"domains": self._domain_names()})

    def _domain_names(self) -> str:
        named = [self.target] if self.source_free else self._sources()
        return ", ".join(f"{source.name} ({len(self._train(source))})" for source in named)

    def _divide(self) -> Split:
        fresh = self.split is None
        if fresh and self.source_free:
            self.split = self._target_split()
        split = super()._divide() if self.split is None else self.split
        if fresh and split.note.get("domains") != self._domain_names():
            raise UserError(
                f"DomainData: split={self.split_path!r} divides {split.note.get('domains', 'no domains')}, "
                f"not {self._domain_names()}"
            )
        return split

    def _target_split(self) -> Split:
        """That of the target alone, the same as beside the sources; from a file its part of one that has both."""
        labels = self._train(self.target).labels
        if self.split_path is None:
            return replace(self.make_split(labels), source=self.target.name)
        given = Split.load(self.split_path)
        named, target = given.note.get("domains", ""), self._domain_names()
        parts = {name: given[name] for name in ("target", "oracle")}
        note = {"domains": target if named.endswith(f", {target}") else named}
        return Split(parts, len(labels), given.seed, self.target.name, note)

    def _hold_out_of(self, labels: Tensor, domain: int, stratify: bool = True) -> tuple[Tensor, Tensor]:
        """(rest, held out) of a domain; without ``stratify`` the labels decide nothing."""
        available = counts(labels, self.num_classes + (not stratify), "DomainData")  # the target may have unknown ones
        size = self.val_size if stratify or self.target_val_size is None else self.target_val_size
        total = size if isinstance(size, int) else round(size * int(available.sum()))
        if total and total >= len(labels):
            name = self._sources()[domain].name
            argument = "val_size" if stratify or self.target_val_size is None else "target_val_size"
            raise UserError(f"DomainData: {argument}={size} leaves nothing of the {len(labels)} samples of {name}")
        stream = generator(self.seed, VAL, domain)
        if stratify:
            held = stratified(labels, proportional(available, total), stream)
        else:
            known = (labels >= 0).nonzero().flatten()
            held = known[torch.randperm(len(known), generator=stream)[:total]].sort().values
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[held] = False
        return rest.nonzero().flatten(), held

    def make_roles(self) -> dict[str, Role]:
        """Two roles: ``source`` and ``target``; ``target`` alone for a method that learns without the source."""
        samples = self._train(self.target).subset(self.parts["target"])
        target = {"target": Role(samples, self.batch_size * self.target_ratio, {}, hidden=True)}
        if self.source_free:
            return target
        return {"source": Role(self._joined("source"), self.batch_size, {}), **target}

    def _joined(self, part: str) -> Samples:
        """One part of all sources as one set; stable numbers go on from source to source."""
        offset = 0
        joined: Samples | None = None
        for number, source in enumerate(self.sources):
            train = self._train(source)
            chosen = train.subset(self.parts[f"{part} {number}"])
            joined = chosen if joined is None else join(joined, chosen, offset)
            offset += int(train.ids.max()) + 1  # a share of a set keeps its numbers in the whole
        assert joined is not None  # there is at least one source: checked on construction
        return joined

    def evaluation_sets(self, stage: str) -> dict[str, Samples]:
        """``val`` and ``oracle``; or ``test``, and ``test/NAME`` of every further test domain."""
        if stage == "test":
            domains = {"test": self.target} | {f"test/{name}": source for name, source in self.tests.items()}
            sets = {name: self._test(source) for name, source in domains.items()}
            for name, samples in sets.items():
                if bool((samples.labels < 0).all()):
                    raise UserError(
                        f"DomainData: no test sample of {domains[name].name} has a label, so nothing can be measured; "
                        "predict"
                    )
            return sets
        sets = {} if self.source_free else {"val": self._joined("val")}
        sets["oracle"] = self._train(self.target).subset(self.parts["oracle"])
        return {name: samples for name, samples in sets.items() if len(samples)}

    def prediction_set(self) -> Samples:
        """The target's test set."""
        return self._test(self.target)

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean, std = self.source.mean, self.source.std
        if len(mean) == self.channels:
            return mean, std
        if self.channels == 3:
            return tuple(mean) * 3, tuple(std) * 3
        return (sum(mean) / 3,), (sum(std) / 3,)


class GeneralizationData(DomainData):
    """Labelled images of several domains; the domain to be generalised to is never seen in training.

    Further domains to be tested on, beside the target, are ``tests``. A vocabulary of texts is built of the sources'.

    Every process and step sees ``batch_size / S`` samples of each of the S source domains, one domain after another:
    sources of any size count alike, as in DomainBed, whose ``batch_size`` is that of one domain. Methods group by
    ``domain``, not by the order.

    Batch: ``source`` {image, label, domain, index}. Validation: ``val``, held-out samples of the source domains
    ("training-domain validation", the default for selection; here all samples count alike, in DomainBed all domains),
    and ``oracle``, held-out samples of the target's training set, on which a model may only be selected if that is said
    aloud. Test: ``test``, the target's test set.

    Args:
        source: the labelled domains, at least one.
        target: the domain that is left out.
        batch_size: source samples per process and step, together over all domains; a multiple of their number.
        **kwargs: see :class:`DomainData`; ``target_ratio`` means nothing here.
    """

    def __init__(self, source: Source | list[Source], target: Source, batch_size: int = 96, **kwargs: Any) -> None:
        super().__init__(source, target, batch_size, **kwargs)
        if batch_size % self.num_domains:
            raise UserError(
                f"GeneralizationData: batch_size={batch_size} must be a multiple of the {self.num_domains} source "
                f"domains, such as {max(batch_size // self.num_domains, 1) * self.num_domains}"
            )

    def _vocabulary_domains(self) -> list[Source]:
        return self.sources

    @property
    def pseudo_label_role(self) -> str | None:
        """None: no role is without labels."""
        return None

    def make_roles(self) -> dict[str, Role]:
        """One role: ``source``."""
        return {"source": Role(self._joined("source"), self.batch_size, {})}

    def make_sampler(self, number: int, role: Role) -> RepeatSampler:
        """As many samples of every domain in every batch."""
        domains = role.samples.columns["domain"]
        return DomainSampler(domains, role.batch_size, self.steps, seed=mix(self.seed, number), **self._replicas())


def adapt(samples: Samples, size: int, channels: int) -> Samples:
    """The same samples with other height, width and channels: at once in memory, on reading from files."""
    if isinstance(samples, TensorSamples):
        from datamodules.sources.digits import resize

        images = resize(samples.images, size)
        if images.shape[1] != channels:  # what has as many as it should need not be grey or RGB
            images = Channels(channels)(images)
        return TensorSamples(images.contiguous(), samples.labels, samples.ids, samples.columns)
    if isinstance(samples, FileSamples):
        return FileSamples(samples.paths, samples.labels, size, channels, samples.ids, samples.columns)
    return samples


def _innermost(source: Source) -> Source:
    """The source that others are wrapped around."""
    while isinstance(source, WrappedSource):
        source = source.source
    return source


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
