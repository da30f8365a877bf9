"""Labels in one or several source domains, none in the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.base import VAL, Data, Role
from datamodules.semi_supervised import join
from datamodules.sources.base import FileSamples, Samples, Source, TensorSamples
from datamodules.splits import Split, counts, generator, proportional, stratified
from datamodules.transforms import Channels, View
from zoo.core.errors import UserError


class DomainData(Data):
    """Labelled images of source domains and unlabelled ones of a target domain.

    Target images are brought to the size and channels of the (first) source, and normalised like it. Domains are
    numbered: 0 .. S-1 the S sources, S the target. Where the target source names its classes, names and order must be
    those of the source.

    Batch: ``source`` {image, label, domain, index}, ``target`` {image, weak, strong, domain, index, hidden_label};
    ``target/image`` is the weak view. Validation: ``val``, held-out labelled source samples, on which a model may be
    selected, and ``oracle``, held-out target samples, whose labels a real user would not have. Test: ``test``, the
    target's test set.

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

    def _sources(self) -> list[Source]:
        return [*self.sources, self.target]

    def prepare_data(self) -> None:
        """Check or fetch the data of every domain, then compare their classes."""
        super().prepare_data()
        self._compare_classes()

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs."""
        self._compare_classes()
        self._compare_vocabularies()
        super().setup(stage)

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
        for number, source in enumerate(self.sources):
            domain = self._train(source).labels
            rest, held = self._hold_out_of(domain, number)
            parts[f"source {number}"], parts[f"val {number}"] = rest[domain[rest] >= 0], held
        target = self._train(self.target).labels
        parts["target"], parts["oracle"] = self._hold_out_of(target, len(self.sources), stratify=False)
        return Split(parts, len(labels), self.seed, self.source.name, {"domains": self._domain_names()})

    def _domain_names(self) -> str:
        return ", ".join(f"{source.name} ({len(self._train(source))})" for source in self._sources())

    def _divide(self) -> Split:
        fresh = self.split is None
        split = super()._divide()
        if fresh and split.note.get("domains") != self._domain_names():
            raise UserError(
                f"DomainData: split={self.split_path!r} divides {split.note.get('domains', 'no domains')}, "
                f"not {self._domain_names()}"
            )
        return split

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
        """Two roles: ``source`` and ``target``."""
        # one domain whose classes do not survive a mirror decides for all
        strictest = next((source for source in self._sources() if not source.flip), self.source)
        weak = self.default_weak(strictest)
        strong = self.default_strong(self.strong, strictest)
        labeled = self._joined("source")
        target = self._train(self.target).subset(self.parts["target"])
        return {
            "source": Role(labeled, self.batch_size, {"image": weak}),
            "target": Role(
                target,
                self.batch_size * self.target_ratio,
                {"weak": weak, "strong": strong},
                aliases={"image": "weak"},
                hidden=True,
            ),
        }

    def _joined(self, part: str) -> Samples:
        """One part of all sources as one set; stable numbers go on from source to source."""
        offset = 0
        joined: Samples | None = None
        for number, source in enumerate(self.sources):
            train = self._train(source)
            chosen = train.subset(self.parts[f"{part} {number}"])
            joined = chosen if joined is None else join(joined, chosen, offset)
            offset += len(train)
        assert joined is not None  # there is at least one source: checked on construction
        return joined

    def evaluation_sets(self, stage: str) -> dict[str, Samples]:
        """``val`` and ``oracle``, or ``test``."""
        if stage == "test":
            return {"test": self._test(self.target)}
        sets = {"val": self._joined("val"), "oracle": self._train(self.target).subset(self.parts["oracle"])}
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


def adapt(samples: Samples, size: int, channels: int) -> Samples:
    """The same samples with other height, width and channels: at once in memory, on reading from files."""
    if isinstance(samples, TensorSamples):
        from datamodules.sources.digits import resize

        images = Channels(channels)(resize(samples.images, size)).contiguous()
        return TensorSamples(images, samples.labels, samples.ids, samples.columns)
    if isinstance(samples, FileSamples):
        return FileSamples(samples.paths, samples.labels, size, channels, samples.ids, samples.columns)
    return samples
