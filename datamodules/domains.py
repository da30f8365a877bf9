"""Labels in one or several source domains, and none in the target or no target at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from datamodules.base import VAL, Role
from datamodules.pseudo_labels import PseudoLabels
from datamodules.samplers import DomainSampler, RepeatSampler, mix
from datamodules.semi_supervised import join
from datamodules.sources.base import FileSamples, Samples, Source, TensorSamples
from datamodules.splits import Split, counts, generator, proportional, stratified
from datamodules.transforms import Channels, View
from zoo.core.errors import UserError


class DomainData(PseudoLabels):
    """Labelled images of source domains and unlabelled ones of a target domain.

    Target images are brought to the size and channels of the (first) source, and normalised like it. Domains are
    numbered: 0 .. S-1 the S sources, S the target. Where the target source names its classes, names and order must be
    those of the source.

    Batch: ``source`` {image, label, domain, index}, ``target`` {image, weak, strong, domain, index, hidden_label,
    pseudo_label, pseudo_label_weight, has_pseudo_label}, or other views where the method names them in ``source_views``
    and ``target_views``: what no method looks at is not made. The last three are what a ``PseudoLabeler`` among the
    callbacks last gave, see :class:`~datamodules.pseudo_labels.PseudoLabels`. Validation: ``val``, held-out labelled
    source samples, on which a model may be selected, and ``oracle``, held-out target samples, whose labels a real user
    would not have. Test: ``test``, the target's test set.

    A method with ``source_views = ()`` learns without the source: nothing of it is then checked, fetched or loaded,
    there is no role ``source`` and no ``val``. What is said of the source, its size and normalisation, still counts.

    Args:
        source: the labelled domain, or a list of them.
        target: the unlabelled domain.
        batch_size: source samples per process and step, together over all sources.
        target_ratio: target samples per source sample.
        strong: the strong view; by default RandAugment and cutout, restricted for digits.
        size: height and width of all images; the first source's if not given.
        channels: 1 or 3; the first source's if not given.
        **kwargs: see :class:`~datamodules.base.Data`.
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
        self.sources = sources
        self.target = target
        self.target_ratio = target_ratio
        self.strong = strong
        self._size = size
        self._channels = channels

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

    def prepare_data(self) -> None:
        """Check or fetch the data of every domain, then compare their classes."""
        for source in [self.target] if self.source_free else self._sources():
            source.prepare()
        self._compare_classes()

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs, and take up the views of the method that is to be trained now."""
        self._compare_classes()
        self._compare_vocabularies()
        if stage in (None, "fit") and self._roles and ("source" in self._roles) == self.source_free:
            self.split, self._roles = None, {}  # it has served a method of the other kind
        super().setup(stage)
        if stage in (None, "fit"):
            # one domain whose classes do not survive a mirror decides for all
            strictest = next((source for source in self._sources() if not source.flip), self.source)
            for name, default in (("source", ("image",)), ("target", ("weak", "strong"))):
                if name in self._roles:
                    views = self.views_of(name, default, self.strong, strictest)
                    self._roles[name].views = views
                    self._roles[name].aliases = {"image": "weak"} if "weak" in views and "image" not in views else {}

    def _compare_classes(self) -> None:
        for other in self._sources()[1:]:
            if other.num_classes != self.num_classes:
                raise UserError(
                    f"DomainData: {self.source.name} has {self.num_classes} classes, but {other.name} has "
                    f"{other.num_classes}; all domains need the same classes"
                )
            if other.modality != self.source.modality:
                raise UserError(
                    f"DomainData: {self.source.name} has {self.source.modality}s, but {other.name} has "
                    f"{other.modality}s; all domains need the same kind of samples"
                )
            unnamed = tuple(str(label) for label in range(self.num_classes))
            if unnamed not in (self.classes, other.classes) and other.classes != self.classes:
                pairs = zip(self.classes, other.classes, strict=True)
                label, (mine, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
                raise UserError(
                    f"DomainData: class {label} is {mine!r} in {self.source.name}, but {theirs!r} in {other.name}; "
                    "all domains need the same classes in the same order"
                )

    def _compare_vocabularies(self) -> None:
        if self.source.modality != "text":
            return
        mine = getattr(self.source, "tokenizer", None)
        for other in self._sources()[1:]:
            theirs = getattr(other, "tokenizer", None)
            if mine is not None and theirs is not None and mine.fingerprint != theirs.fingerprint:
                raise UserError(
                    f"DomainData: {self.source.name} and {other.name} have different vocabularies, so that an id is "
                    "another word in each; give all domains the same tokenizer, a file or hf:NAME"
                )

    def _load(self, source: Source, part: str) -> Samples:
        key = f"{part} {id(source)}"
        if key not in self._loaded:
            domain = next(number for number, other in enumerate(self._sources()) if other is source)
            samples = adapt(super()._load(source, part), self.size, self.channels)
            self._loaded[key] = samples.with_columns(domain=torch.full((len(samples),), domain))
        return self._loaded[key]

    def make_split(self, labels: Tensor) -> Split:
        """Validation of every domain: parts ``val 0`` .. of the sources, ``oracle`` of the target."""
        parts: dict[str, Tensor] = {}
        for number, source in enumerate([] if self.source_free else self.sources):
            domain = self._train(source).labels
            rest, held = self._hold_out_of(domain, number)
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
        *_, last = given.note.get("domains", "").split(", ")
        parts = {name: given[name] for name in ("target", "oracle")}
        return Split(parts, len(labels), given.seed, self.target.name, {"domains": last})

    def _hold_out_of(self, labels: Tensor, domain: int, stratify: bool = True) -> tuple[Tensor, Tensor]:
        """(rest, held out) of a domain; without ``stratify`` the labels decide nothing."""
        available = counts(labels, self.num_classes, "DomainData")
        total = self.val_size if isinstance(self.val_size, int) else round(self.val_size * int(available.sum()))
        if total and total >= len(labels):
            name = self._sources()[domain].name
            raise UserError(
                f"DomainData: val_size={self.val_size} leaves nothing of the {len(labels)} samples of {name}"
            )
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
        """``val`` and ``oracle``, or ``test``."""
        if stage == "test":
            return {"test": self._test(self.target)}
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

    Every process and step sees ``batch_size / S`` samples of each of the S source domains, one domain after another:
    sources of any size count alike, as in DomainBed, whose ``batch_size`` is that of one domain. Methods group by
    ``domain``, not by the order.

    Batch: ``source`` {image, label, domain, index}. Validation: ``val``, held-out samples of the source domains
    ("training-domain validation", the default for selection), and ``oracle``, held-out samples of the target's training
    set, on which a model may only be selected if that is said aloud. Test: ``test``, the target's test set.

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
