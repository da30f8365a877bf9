"""Programmatic weak supervision: labelling functions vote on samples that nobody has labelled."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.base import HALVES, Role
from datamodules.each_once import EachOnce
from datamodules.labeling.base import LabelingFunction, votes_of
from datamodules.labeling.features import Features
from datamodules.labeling.fingerprints import UnknownContentError, data_digest, digest
from datamodules.samplers import EvalSampler
from datamodules.sources.base import Samples, Source
from datamodules.sources.text import TextSource
from datamodules.splits import Split, generator, halved
from zoo.core.errors import UserError
from zoo.core.votes import VoteAnalysis, accuracy, analyze

_FIT_ON = 10_000  # samples that features are found from
_FIT_BYTES = 1 << 30  # of them, in images
_AT_ONCE = 1 << 26  # bytes of images that functions see at a time
ALL = ("texts", "tokens", "image", "features")
FEATURES = 21  # purpose of a random stream


class VoteSamples(Samples):
    """Samples of which the votes are known and nothing else is asked for.

    Args:
        votes: (N, M); kept as int16, handed over as int64.
        labels: (N,).
        ids: stable numbers.
        columns: further tensors of length N.
    """

    def __init__(
        self, votes: Tensor, labels: Tensor, ids: Tensor | None = None, columns: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__(labels, ids, columns)
        self.votes = votes.to(torch.int16)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        where = torch.as_tensor(indices, dtype=torch.int64)
        batch = {"votes": self.votes[where].long(), "label": self.labels[where], "index": self.ids[where]}
        return batch | {name: column[where] for name, column in self.columns.items()}

    def images_at(self, where: Tensor) -> Tensor:
        """There are none."""
        raise UserError("VoteSamples: votes have no images; the end model is trained on them by WeakLabelData")

    def _select(self, where: Tensor) -> dict[str, Any]:
        return {"votes": self.votes[where]}


class LabelingFunctionData(EachOnce):
    r"""Labelling functions vote on half B of the training set; half A, the labelled few, is what they may learn from.

    A method that reads ``votes`` finds out how far to trust each function and says what the labels are; ``zoo predict``
    writes them, and :class:`~datamodules.weak_labels.WeakLabelData` trains the end model with ``role: student`` and
    ``split: RUN/split.json``, which makes its halves these. With ``num_labels`` the few are those that
    :class:`~datamodules.SupervisedData` and :class:`~datamodules.SemiSupervisedData` draw for the same seed and
    validation size; without it the halves are those of ``WeakLabelData``.

    Votes are cast once and kept (below ``$XDG_CACHE_HOME`` or ``~/.cache``) under a fingerprint of functions,
    features, labelled few and data, source code of own functions included, so that old ones are never taken for new.
    The run's folder gets ``labeling_functions.csv``: where each function votes, and how often it is right on the few.

    Batch: ``votes`` {votes (B, M) int64, -1 = abstain; index; hidden_label}. Evaluation: {votes, label, index}.

    Args:
        source: where samples come from.
        functions: of :mod:`datamodules.labeling`, or own ones.
        features: what makes the column ``features``, for functions that read it; fitted, if at all, without labels.
        num_labels: size of half A, as even over classes as can be; 0 for functions that learn nothing.
        supervisor_share: otherwise its share of the training set (without validation).
        batch_size: samples per process and step.
        steps: of an epoch; by default as many as it takes to hand over every sample exactly once.
        predict_on: ``half`` B (and the held-out part, which the end model's validation needs), or the ``test`` set.
        keep: keep votes, and use those that were kept.
        **kwargs: see :class:`~datamodules.base.Data`.

    Raises:
        UserError: for functions of equal names, that read what the source has not, that vote for classes that do not
            exist, or that abstain on all of half B.

    Source: Ratner et al. 2016, "Data Programming", arXiv 1605.07723; few labels as in Roberts et al. 2022,
    "AutoWS-Bench-101", arXiv 2208.14362.
    """

    def __init__(
        self,
        source: Source,
        functions: list[LabelingFunction],
        features: Features | None = None,
        num_labels: int | None = None,
        supervisor_share: float = 0.5,
        batch_size: int = 1024,
        steps: int | None = None,
        predict_on: Literal["half", "test"] = "half",
        keep: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(source, batch_size, steps, **kwargs)
        if predict_on not in ("half", "test"):
            raise UserError(f"LabelingFunctionData: predict_on={predict_on!r} must be 'half' or 'test'")
        if not 0 < supervisor_share < 1:
            raise UserError(f"LabelingFunctionData: supervisor_share={supervisor_share} must be between 0 and 1")
        if num_labels is not None and num_labels < 0:
            raise UserError(f"LabelingFunctionData: num_labels={num_labels} must not be negative")
        if self.predict_folder is not None:
            raise UserError("LabelingFunctionData: functions label what the source has, not predict_folder")
        if not functions:
            raise UserError("LabelingFunctionData: functions is empty; at least one must vote")
        _distinct([function.name for function in functions])
        learning = [function.name for function in functions if function.automatic]
        if num_labels == 0 and learning:
            raise UserError(f"LabelingFunctionData: num_labels=0, but {learning[0]} learns from labelled samples")
        self.functions = functions
        self.features = features
        self.num_labels = num_labels
        self.supervisor_share = supervisor_share
        self.predict_on = predict_on
        self.keep = keep
        self._texts: dict[str, list[str]] = {}
        self._names: list[str] = []
        self._votes: dict[str, Tensor] = {}
        self._prepared = self._fitted = False
        self._decides = ""  # fingerprint of all but the samples that are voted on

    # What methods ask for --------------------------------------------------------------------------------------------

    @property
    def function_names(self) -> list[str]:
        """Names (M) of the columns of votes."""
        mask = self._speaking().tolist()
        return [name for name, speaks in zip(self._names, mask, strict=True) if speaks]

    @property
    def num_functions(self) -> int:
        """M."""
        return len(self.function_names)

    def labeled_votes(self) -> tuple[Tensor, Tensor]:
        """Votes (n, M) int64 and labels (n,) of the labelled few."""
        few = self._train(self.source).subset(self.parts["supervisor"])
        return self._voted(few, "train").votes.long(), few.labels

    def analysis(self) -> VoteAnalysis:
        """Coverage, overlap and conflict of every function on half B; as a string, a table."""
        half = self._voted(self._train(self.source).subset(self.parts["student"]), "train")
        return analyze(half.votes, self.num_classes, names=self.function_names)

    def votes_dataloader(self) -> Any:
        """Half B, each sample once, in order, and all for every process: {votes, index}."""
        samples = self._voted(self._train(self.source).subset(self.parts["student"]), "train")
        unlabeled = VoteSamples(samples.votes, torch.full_like(samples.labels, -1), samples.ids)
        return self._loader(unlabeled, EvalSampler(unlabeled, self.eval_batch_size, num_replicas=1, rank=0))

    # A regime's part -------------------------------------------------------------------------------------------------

    def make_split(self, labels: Tensor) -> Split:
        """Validation first; of the rest half A is ``supervisor``, half B ``student``."""
        rest, val = self.hold_out(labels)
        if self.num_labels is None:
            few, others = halved(labels, rest, self.supervisor_share, self.num_classes, generator(self.seed, HALVES))
        else:
            rest = rest[labels[rest] >= 0]
            few = rest[:0]
            if self.num_labels:
                few = self.choose_labeled(labels, rest, None, self.num_labels, None)
            others = rest[~torch.isin(rest, few)]
        return Split({"supervisor": few, "student": others, "val": val}, len(labels), self.seed, self.source.name)

    def setup(self, stage: str | None = None) -> None:
        """Load, divide, and check that functions and source go together."""
        if not self._prepared:
            self._prepare()
        super().setup(stage)

    def make_roles(self) -> dict[str, Role]:
        """One role: ``votes``."""
        samples = self._voted(self._train(self.source).subset(self.parts["student"]), "train")
        return {"votes": Role(samples, self.batch_size, {}, hidden=True)}

    def evaluation_sets(self, stage: str) -> dict[str, Samples]:
        """Votes on the validation or the test set."""
        part = "test" if stage == "test" else "train"
        return {name: self._voted(samples, part) for name, samples in super().evaluation_sets(stage).items()}

    def prediction_set(self) -> Samples:
        """Votes on half B and the held-out part, in the order of their numbers; or on the test set."""
        if self.predict_on == "test":
            return self._voted(self._test(self.source), "test")
        both = torch.cat([self.parts["student"], self.parts["val"]]).sort().values
        return self._voted(self._train(self.source).subset(both), "train")

    @property
    def predicts(self) -> str:
        """``train``, unless the test set is asked for."""
        return "train" if self.predict_on == "half" else "test"

    # Details ---------------------------------------------------------------------------------------------------------

    def _write_split(self) -> None:
        """Beside it ``labeling_functions.csv``: what each did on half B, and how often it is right on the few."""
        super()._write_split()
        if self.trainer is None or getattr(self.trainer, "fast_dev_run", False):
            return
        folder = self.trainer.log_dir  # on all ranks: it is a collective
        if folder is not None and self.trainer.is_global_zero and (Path(folder) / "split.json").is_file():
            rates = accuracy(*self.labeled_votes()).tolist()
            with open(Path(folder) / "labeling_functions.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["function", "classes", "coverage", "overlap", "conflict", "accuracy_on_labeled"])
                for row, rate in zip(self.analysis().rows(), rates, strict=True):
                    classes = " ".join(self.classes[number] for number in row.pop("classes"))  # type: ignore[attr-defined]
                    values = [f"{row[name]:.6f}" for name in ("coverage", "overlap", "conflict")]
                    writer.writerow([row["function"], classes, *values, "" if rate != rate else f"{rate:.6f}"])

    def _prepare(self) -> None:
        has = {"texts", "tokens"} if self.source.modality == "text" else {"image"}
        kind = "texts" if self.source.modality == "text" else "images"
        for thing in (*self.functions, self.features):
            for column in getattr(thing, "needs", ()):
                if column in {"texts", "tokens", "image"} - has:
                    name = thing.name if isinstance(thing, LabelingFunction) else type(thing).__name__
                    raise UserError(f"LabelingFunctionData: {name} reads {column!r}, but {self.source.name} has {kind}")
                if column == "features" and self.features is None:
                    raise UserError(
                        f"LabelingFunctionData: {getattr(thing, 'name', thing)} reads features; say what makes them: "
                        "data.features, such as PrincipalComponents"
                    )
        if self.features is not None:
            self.features.prepare(self.source)
        for function in self.functions:
            function.prepare(self.source, self.features)
        self._prepared = True

    def _columns(self, samples: Samples, part: str, where: Tensor) -> dict[str, Any]:
        """What functions see of the samples at these positions: everything but labels."""
        batch: dict[str, Any] = samples[where.tolist()]
        batch.pop("label", None)
        inputs = batch.pop("image")
        columns = {name: column for name, column in batch.items() if not name.startswith("_")}
        if self.source.modality == "text":
            texts = self._texts_of(part, samples)
            columns |= {"tokens": inputs, "texts": [texts[number] for number in batch["index"].tolist()]}
        else:
            columns["image"] = inputs.float() / 255
        if self.features is not None and self._fitted_features:
            columns["features"] = self.features(columns).float()
        return columns

    _fitted_features = False

    def _texts_of(self, part: str, samples: Samples) -> list[str]:
        """The texts themselves, by the samples' numbers."""
        if part not in self._texts:
            source: Any = self.source
            while not isinstance(source, TextSource) and hasattr(source, "source"):
                source = source.source
            if not isinstance(source, TextSource):
                raise UserError(f"LabelingFunctionData: {self.source.name} keeps no texts, only their tokens")
            self._texts[part] = source.read()[part][0]
        texts = self._texts[part]
        if len(samples) and int(samples.ids.max()) >= len(texts):
            raise UserError(f"LabelingFunctionData: {self.source.name} numbers its samples unlike its texts")
        return texts

    def _bytes(self) -> int:
        """Of a sample, about."""
        return 1 << 12 if self.source.modality == "text" else 4 * self.source.channels * self.source.size**2

    @property
    def _reads_features(self) -> bool:
        """Whether any function does; one that does not say what it needs may."""
        return any("features" in (function.needs or ("features",)) for function in self.functions)

    def _chunks(self, samples: Samples) -> Iterator[Tensor]:
        return iter(torch.arange(len(samples)).split(max(1, _AT_ONCE // self._bytes())))

    def _gathered(self, samples: Samples, part: str, needed: Sequence[str]) -> dict[str, Any]:
        """These columns of all samples at once."""
        chunks = []
        for where in self._chunks(samples):
            columns = self._columns(samples, part, where)
            chunks.append({name: column for name, column in columns.items() if name in needed or name == "index"})
        found: dict[str, Any] = {}
        for name in chunks[0]:
            rows = [chunk[name] for chunk in chunks]
            found[name] = torch.cat(rows) if isinstance(rows[0], Tensor) else [entry for row in rows for entry in row]
        return found

    def _fit(self) -> None:
        """Features from all training samples but the validation's, automatic functions from the labelled few."""
        if self._fitted:
            return
        train = self._train(self.source)
        if self.features is not None and self._reads_features:
            pool = torch.cat([self.parts["supervisor"], self.parts["student"]])
            most = max(1000, min(_FIT_ON, _FIT_BYTES // self._bytes()))
            order = torch.randperm(len(pool), generator=generator(self.seed, FEATURES))[:most].sort().values
            self.features.fit(self._gathered(train.subset(pool[order]), "train", self.features.needs))
            self._fitted_features = True
        learning = [function for function in self.functions if function.automatic]
        if learning:
            few = train.subset(self.parts["supervisor"])
            needed = [name for function in learning for name in function.needs or (*ALL, *few.columns)]
            columns = self._gathered(few, "train", needed)
            for function in learning:
                function.fit(columns, few.labels, self.num_classes)
        self._names = [name for function in self.functions for name in function.names]
        _distinct(self._names)
        self._fitted = True

    def _cast(self, samples: Samples, part: str) -> Tensor:
        """All votes on these samples, (n, M) int16."""
        self._fit()
        rows = []
        for where in self._chunks(samples):
            columns = self._columns(samples, part, where)
            rows.append(torch.cat([votes_of(f, columns, self.num_classes) for f in self.functions], 1).short())
        return torch.cat(rows) if rows else torch.empty(0, len(self._names), dtype=torch.int16)

    def _all_votes(self, samples: Samples, part: str) -> Tensor:
        """Votes on these samples, those of silent functions too: known, kept, or cast now."""
        key = f"{part} {digest(samples.ids)}"
        if key not in self._votes:
            with self._one_after_another():
                file = self._file(samples, part)
                found = None if file is None else _read(file)
                if found is None:
                    found = self._cast(samples, part), self._names
                    if file is not None:
                        _write(file, *found)
                self._votes[key], self._names = found
        return self._votes[key]

    def _speaking(self) -> Tensor:
        """Which columns (M,) ever vote on half B.

        Raises:
            UserError: for a function that never does. One that learnt several rules may lose some.
        """
        votes = self._all_votes(self._train(self.source).subset(self.parts["student"]), "train")
        speaks = (votes >= 0).any(dim=0)
        if not self._silence_checked and len(votes):
            self._silence_checked = True
            silent = [name for name, says in zip(self._names, speaks.tolist(), strict=True) if not says]
            by_hand = {name for function in self.functions if not function.automatic for name in function.names}
            mute = [name for name in silent if name in by_hand]
            if mute or not bool(speaks.any()):
                named = mute or silent
                raise UserError(
                    f"LabelingFunctionData: {', '.join(named[:5])}{' ...' if len(named) > 5 else ''} "
                    f"{'abstains' if len(named) == 1 else 'abstain'} on all {len(votes)} samples to be labelled; leave "
                    f"{'it' if len(named) == 1 else 'them'} out, or look at what "
                    f"{'it looks' if len(named) == 1 else 'they look'} for"
                )
            if silent:
                rank_zero_warn(f"LabelingFunctionData: {len(silent)} rules that never vote are left out: {silent[:5]}")
        return speaks

    _silence_checked = False

    def _voted(self, samples: Samples, part: str) -> VoteSamples:
        speaks = self._speaking()
        return VoteSamples(self._all_votes(samples, part)[:, speaks], samples.labels, samples.ids)

    def _file(self, samples: Samples, part: str) -> Path | None:
        """Where votes on these samples are kept; None where they cannot be told apart from others'."""
        if not self.keep:
            return None
        try:
            if not self._decides:
                import sklearn

                train = self._train(self.source)
                pool = torch.cat([self.parts["supervisor"], self.parts["student"]])
                few = self.parts["supervisor"]
                texts = self._texts_of("train", train) if self.source.modality == "text" else None
                learning = self.features is not None or any(function.automatic for function in self.functions)
                self._decides = digest([
                    1, torch.__version__, sklearn.__version__, self.functions, self.features, self.num_classes,
                    self.source.mean, self.source.std, self.seed,
                    [data_digest(train, texts), pool, few, train.labels[few]] if learning else None,
                ])  # fmt: skip
            texts = None
            if self.source.modality == "text":
                everything = self._texts_of(part, samples)
                texts = [everything[number] for number in samples.ids.tolist()]
            name = digest([self._decides, part, data_digest(samples, texts)])
        except UnknownContentError:
            return None
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labelight"
        return folder / f"votes-{name[:32]}.safetensors"

    @contextlib.contextmanager
    def _one_after_another(self) -> Iterator[None]:
        """The first process, which may keep votes, before the others, which then find them."""
        trainer = self.trainer
        several = trainer is not None and trainer.world_size > 1
        if several and not trainer.is_global_zero:  # type: ignore[union-attr]
            trainer.strategy.barrier("votes")  # type: ignore[union-attr]
        try:
            yield
        finally:
            if several and trainer.is_global_zero:  # type: ignore[union-attr]
                trainer.strategy.barrier("votes")  # type: ignore[union-attr]


def _distinct(names: Sequence[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise UserError(f"LabelingFunctionData: two functions are called {name!r}; give one of them another name")


def _read(file: Path) -> tuple[Tensor, list[str]] | None:
    """Votes and names; None where there are none, or a file that is cut off."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor("votes"), json.loads(opened.metadata()["names"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _write(file: Path, votes: Tensor, names: list[str]) -> None:
    """In one piece or not at all; votes that cannot be kept are cast again."""
    from safetensors.torch import save_file

    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"votes": votes.contiguous()}, temporary, metadata={"names": json.dumps(names)})
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
