"""What a network makes of the domains: one picture at the end of every test, and one number."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.features import evenly, features_of, has_features, loader_of, network_of, rows_of
from callbacks.files import run_folder, write_atomically
from callbacks.heard import HeardLogits
from callbacks.picture import _nothing, _per_class, show
from callbacks.run_summary import Counts
from datamodules.domains import DomainData
from datamodules.sources.base import Samples
from zoo.core.errors import UserError, suggest
from zoo.core.validators import a_distance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by readers of any colour vision (Okabe and Ito 2008; Tol 2021, "muted" with a black one).
TARGET = "#D55E00"
SOURCES = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#000000")
CLASSES = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#000000"
)  # fmt: skip
OTHERS = "#DDDDDD"
ADAPTED = ("target, before", "target, adapted")
Projection = Literal["pca", "tsne"]


class DomainPictures(Callback):
    r"""At the end of every test, draws the features of source and target, and says how far the domains are apart.

    ``domains.png`` in the run folder shows the features in two dimensions, once coloured by domain and once by class,
    and the accuracy of every class, on the source and on the target; where a method adapts while it is tested, on the
    target as it was and as it is adapted. Logged is ``domain/a_distance``, the proxy A-distance
    :math:`2 (1 - 2 \epsilon)` of these features, see :func:`~zoo.core.validators.a_distance`: 0 where a linear
    classifier cannot tell the domains apart, 2 where it never errs. A small distance is no success by itself: features
    that are all alike have it too.

    The samples are those of the test sets, evenly spaced; of a source without a test set its held-out ones. Labels of
    the target are read, as in every test; nothing is chosen or trained by them. Where
    :class:`~callbacks.RunSummary` tests the last and the selected weights, the latter's picture is
    ``domains_selected.png``. TensorBoard and W&B are given the pictures.

    Args:
        projection: ``"pca"``, the two directions of largest variance, or ``"tsne"``, which shows neighbourhoods, not
            distances, and takes seconds.
        max_samples: samples of a domain for the picture and the distance.
        picture: draw; otherwise the distance is all.
        seed: of the halves between which the distance is measured, of t-SNE and of the order of drawing.

    Attributes:
        domain_reports: by weights (``last``, ``selected``): ``a_distance``, and ``accuracy`` with a list per domain.

    Raises:
        UserError: for another projection or too few samples; at setup, for data without domains.
    """

    measures_tests = True

    def __init__(
        self, projection: Projection = "pca", max_samples: int = 1000, picture: bool = True, seed: int = 0
    ) -> None:
        if projection not in ("pca", "tsne"):
            near = suggest(projection, ["pca", "tsne"])
            raise UserError(f"DomainPictures: projection={projection!r} must be 'pca' or 'tsne'.{near}")
        if max_samples < 4:
            raise UserError(f"DomainPictures: max_samples={max_samples} must be at least 4")
        self.projection: Projection = projection
        self.max_samples, self.picture, self.seed = max_samples, picture, seed
        self.weights = "last"  # whoever tests others says so
        self.domain_reports: dict[str, dict[str, Any]] = {}
        self._counts: dict[str, Counts] = {}
        self._heard = HeardLogits()
        self._loggers: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before anything costs time that there are domains."""
        if stage not in ("fit", "test"):
            return
        data = _whole(trainer)
        if not isinstance(data, DomainData):
            raise UserError(f"DomainPictures: {type(data).__name__} has no source and target domain")
        if data.source_free:
            raise UserError(f"DomainPictures: {type(pl_module).__name__} must not see the source, which would be shown")
        if trainer.loggers:  # a test after a training has none of its own
            self._loggers = list(trainer.loggers)

    # --- counting while the method is tested --------------------------------------------------------------------------

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the method's own forward."""
        self._counts = {}
        self._heard.listen(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count one batch of the first loader."""
        heard = self._heard.take(batch)
        if dataloader_idx:
            return
        # a method that adapts to the batch has shown what it said before, too
        for name, (logits, label) in zip(ADAPTED if len(heard) > 1 else ("target",), heard, strict=False):
            self._counts.setdefault(name, Counts(logits.shape[1], logits.device)).update(logits, label)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the domains together, measure, log, draw."""
        counts, self._counts = self._counts, {}
        self._heard.leave()
        if not has_features(pl_module):
            rank_zero_warn(f"DomainPictures: the network of {type(pl_module).__name__} has no features to look at")
            return
        for name in [name for name in ("target", *ADAPTED) if name in counts]:
            counts[name].reduce()
        data, network = _whole(trainer), network_of(pl_module)
        test = data.evaluation_sets("test")["test"]
        share = max(self.max_samples // len(data.sources), 4)
        domains: dict[str, tuple[Tensor, Tensor]] = {}
        for number in range(len(data.sources)):
            samples = _part(_source_test(data, number), share)
            name = data.sources[number].name
            domains[name if name not in domains else f"{name} {number}"] = features_of(trainer, pl_module, samples)
            index, logits = rows_of(trainer, loader_of(trainer, samples), pl_module)
            if logits.ndim == 2:
                labels = samples.labels[torch.searchsorted(samples.ids, index)]
                counts.setdefault("source", Counts(logits.shape[1])).update(logits, labels)
        source = torch.cat([features for features, _ in domains.values()])
        samples = _part(test, self.max_samples)
        target = features_of(trainer, pl_module, samples, _adapted(pl_module) or network)
        distance = a_distance(source, target[0], self.seed)
        pl_module.log("domain/a_distance", distance, batch_size=1, rank_zero_only=False)
        accuracy = {name: _recall(counts[name]) for name in ("source", "target", *ADAPTED) if name in counts}
        self.domain_reports[self.weights] = {"a_distance": distance, "accuracy": accuracy}
        folder = run_folder(trainer)  # on all ranks: it is a collective
        if self.picture and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            domains[f"{data.target.name}, target"] = target
            self._draw(trainer, pl_module, folder, domains, accuracy, distance)

    def _draw(self, trainer: Trainer, pl_module: LightningModule, folder: Path, *found: Any) -> None:
        domains, accuracy, distance = found
        name = "domains" if self.weights == "last" else f"domains_{self.weights}"
        title = f"{type(pl_module).__name__} · {folder.name}" + ("" if self.weights == "last" else f" · {self.weights}")
        figure = draw_domains(domains, accuracy, _whole(trainer).classes, title, distance, self.projection, self.seed)
        write_atomically(folder / f"{name}.png", lambda path: figure.savefig(path, dpi=110))
        show(figure, trainer.loggers or self._loggers, trainer.global_step, name)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._heard.leave()


def _whole(trainer: Trainer) -> Any:
    """The data module, also where only a part of it is tested."""
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "data", data)


def _part(samples: Samples, at_most: int) -> Samples:
    """At most so many of the samples, in the order of their numbers."""
    chosen = evenly(len(samples), at_most)
    return samples.subset(chosen[samples.ids[chosen].argsort()])


def _source_test(data: DomainData, number: int) -> Samples:
    """The test set of a source; where it has none, what was held out of its training set."""
    with contextlib.suppress(UserError):
        if len(samples := data._test(data.sources[number])):
            return samples
    return data._train(data.sources[number]).subset(data.parts[f"val {number}"])


def _adapted(module: LightningModule) -> Any:
    """The copy that has adapted to the test set, of a method that has one."""
    try:
        return module.adapted
    except (AttributeError, AssertionError):
        return None


def _recall(counts: Counts) -> list[float | None]:
    """The accuracy of every class; None where there was no sample of it."""
    right, number = counts.confusion.diagonal().double(), counts.confusion.sum(dim=1)
    return [round(float(r / n), 6) if n else None for r, n in zip(right, number, strict=True)]


def project(features: Tensor, projection: Projection, seed: int = 0) -> tuple[Tensor, tuple[str, str]]:
    """Features (N, D) in two dimensions, (N, 2), and what these are."""
    rows = features.double().numpy()
    if projection == "pca":
        from sklearn.decomposition import PCA

        fitted = PCA(2, svd_solver="full")
        found = fitted.fit_transform(rows)
        parts = [f"{share:.0%} of variance" for share in fitted.explained_variance_ratio_]
        return torch.from_numpy(found), (f"first component, {parts[0]}", f"second component, {parts[1]}")
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(rows) - 1) / 3)
    found = TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(rows)
    return torch.from_numpy(found), ("t-SNE, first", "t-SNE, second")


def draw_domains(
    domains: Mapping[str, tuple[Tensor, Tensor]],
    accuracy: Mapping[str, Sequence[float | None]],
    classes: Sequence[str],
    title: str,
    distance: float,
    projection: Projection = "pca",
    seed: int = 0,
) -> Figure:
    """The picture of the domains.

    Args:
        domains: features (N, D) and labels (N,) by name; the target is the last.
        accuracy: of every class, by domain; may be empty.
        classes: their names.
        title: of the whole.
        distance: the A-distance between sources and target.
        projection: see :class:`DomainPictures`.
        seed: of the order of drawing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    features = torch.cat([rows for rows, _ in domains.values()])
    labels = torch.cat([label for _, label in domains.values()])
    domain = torch.arange(len(domains)).repeat_interleave(torch.tensor([len(label) for _, label in domains.values()]))
    points, axes_names = project(features, projection, seed)
    # A figure with its own canvas: pyplot would choose the process's backend.
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    meaning = "0: a linear classifier cannot tell source from target, 2: it never errs"
    figure.suptitle(f"{title}\nA-distance {distance:.2f}   ({meaning})", fontsize="medium")
    axes = figure.subplot_mosaic([["domain", "class"], ["bars", "bars"]], height_ratios=[5, 3])
    shuffled = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))  # no domain hides another
    colours = [*(SOURCES[n % len(SOURCES)] for n in range(len(domains) - 1)), TARGET]
    _scatter(axes["domain"], points, shuffled, domain, [colours[d] for d in domain.tolist()], len(domains) - 1)
    for number, name in enumerate(domains):
        marker = "^" if number == len(domains) - 1 else "o"
        axes["domain"].plot([], [], marker, color=colours[number], label=f"{name} ({int((domain == number).sum()):,})")
    axes["domain"].legend(fontsize="small")
    axes["domain"].set_title("features by domain")
    shown = _shown_classes(labels, len(classes))
    colour_of = {label: CLASSES[rank] for rank, label in enumerate(shown)}
    by_class = [colour_of.get(label, OTHERS) for label in labels.tolist()]
    _scatter(axes["class"], points, shuffled, domain, by_class, len(domains) - 1)
    for label in shown:
        x, y = points[labels == label].median(dim=0).values.tolist()
        axes["class"].text(
            x, y, str(classes[label]), ha="center", va="center", fontsize="small", weight="bold",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colour_of[label], "alpha": 0.85},
        )  # fmt: skip
    for marker, name in (("o", "source"), ("^", "target")):
        axes["class"].plot([], [], marker, color="grey", label=name)
    axes["class"].legend(fontsize="small")
    few = "" if len(shown) == len(classes) else f", the {len(shown)} most frequent"
    axes["class"].set_title(f"the same by class{few}")
    for name in ("domain", "class"):
        axes[name].set_xlabel(axes_names[0])
        axes[name].set_ylabel(axes_names[1])
    if accuracy:
        bars = [SOURCES[0], *([TARGET] if len(accuracy) == 2 else ["#F5BE98", TARGET])]
        axes["bars"].set_prop_cycle(color=bars if "source" in accuracy else bars[1:])
        means = {name: [v for v in values if v is not None] for name, values in accuracy.items()}
        named = {f"{k} (mean {sum(means[k]) / max(len(means[k]), 1):.2f})": v for k, v in accuracy.items()}
        _per_class(axes["bars"], named, classes, "accuracy of every class")
        axes["bars"].set_ylim(0, 1.25)  # the legend stays clear of the bars
        axes["bars"].set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes["bars"].legend(fontsize="small", loc="upper center", ncols=len(named))
    else:
        axes["bars"].set_title("accuracy of every class")
        _nothing(axes["bars"], "no class predictions were evaluated")
    return figure


def _shown_classes(labels: Tensor, count: int) -> list[int]:
    """Those that have a colour: all, or of many the most frequent, in the order of their numbers."""
    frequency = torch.bincount(labels[(labels >= 0) & (labels < count)], minlength=count)
    ranked = frequency.argsort(descending=True, stable=True)[: len(CLASSES)]
    return sorted(int(label) for label in ranked if frequency[label])


def _scatter(axis: Any, points: Tensor, order: Tensor, domain: Tensor, colours: Sequence[str], target: int) -> None:
    """Circles for sources, triangles for the target, drawn in turns."""
    for part in order.tensor_split(8):
        for is_target, marker in ((False, "o"), (True, "^")):
            rows = part[(domain[part] == target) == is_target]
            if not len(rows):
                continue
            x, y = points[rows].unbind(dim=1)
            axis.scatter(x, y, s=14, c=[colours[row] for row in rows], marker=marker, linewidths=0, alpha=0.7)
    axis.set_xticks([])
    axis.set_yticks([])
