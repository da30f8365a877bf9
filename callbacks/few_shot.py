"""What features are worth for classes that nobody trained on: few-shot tasks, solved by clustering."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.features import check_source, features_of
from datamodules.sources.base import Source
from zoo.core.clustering import Prototype, cluster, draw_tasks, prepare_tasks
from zoo.core.errors import UserError


class FewShotEvaluation(Callback):
    r"""At every test, draws few-shot tasks of other classes and clusters the features of each.

    A task has ``ways`` classes, of each of which a few *support* samples are labelled and ``queries`` samples are to be
    classified, all together (transductively), see :mod:`zoo.core.clustering`. For every number of shots it logs
    ``few_shot/<S>_shot/accuracy``, the mean over the tasks, and ``…/interval``, half the 95 % confidence interval
    :math:`1.96\, s / \sqrt{E}`; ``…/nearest_prototype`` is the accuracy of the same prepared features without any
    clustering. The tasks are the same at every test.

    Args:
        source: whose test samples the tasks are drawn from, classes that the network was not trained on.
        ways: classes of a task.
        shots: support samples per class, one evaluation each.
        queries: query samples per class.
        tasks: number of tasks.
        prototype: ``mean`` (K-means), ``mode`` (K-modes, mean shift) or ``medoid``.
        weight: λ ≥ 0 of the neighbours' pull.
        neighbors: of the graph.
        temperature: of the assignments; 0 is hard.
        seed: of the tasks.

    Raises:
        UserError: at setup, for a source that does not fit the data or has too few classes or samples.

    Source: Ziko et al. 2021, arXiv 2106.09516, table 1 (600 tasks, 5 classes, 15 queries); features are centred on the
    pool's mean, where the paper takes that of the classes trained on.
    """

    measures_tests = True

    def __init__(
        self,
        source: Source,
        ways: int = 5,
        shots: Sequence[int] = (1, 5),
        queries: int = 15,
        tasks: int = 600,
        prototype: Prototype = "mean",
        weight: float = 0.0,
        neighbors: int = 3,
        temperature: float = 0.1,
        seed: int = 0,
    ) -> None:
        for name, value in (("ways", ways), ("queries", queries), ("tasks", tasks), *(("shots", s) for s in shots)):
            if value < 1:
                raise UserError(f"FewShotEvaluation: {name}={value} must be at least 1")
        self.source = source
        self.ways, self.shots, self.queries, self.tasks = ways, list(shots), queries, tasks
        self.prototype: Prototype = prototype
        self.weight, self.neighbors, self.temperature, self.seed = weight, neighbors, temperature, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before anything costs time."""
        if stage in ("fit", "test"):
            check_source("FewShotEvaluation", self.source, trainer)
            labels = self.source.test().labels
            draw_tasks(labels, 1, self.ways, max(self.shots), self.queries, torch.Generator())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, cluster, log."""
        features, labels = features_of(trainer, pl_module, self.source.test())
        center = features.mean(dim=0)
        for shots in self.shots:
            stream = torch.Generator().manual_seed(self.seed)
            support, query = draw_tasks(labels, self.tasks, self.ways, shots, self.queries, stream)
            x, q = prepare_tasks(features[support], features[query], center)
            known = torch.arange(self.ways).repeat_interleave(shots).expand(self.tasks, -1)
            truth = torch.arange(self.ways).repeat_interleave(self.queries)
            found = cluster(x, known, q, self.prototype, self.weight, self.neighbors, self.temperature).assignments[
                :, x.shape[1] :
            ]
            prototypes = x.view(self.tasks, self.ways, shots, -1).mean(dim=2)
            nearest = torch.cdist(q, prototypes).argmin(dim=2)
            accuracy = (found.argmax(dim=2) == truth).double().mean(dim=1)  # of every task
            values = {
                "accuracy": accuracy.mean(),
                "interval": 1.96 * accuracy.std() / math.sqrt(self.tasks) if self.tasks > 1 else torch.tensor(0.0),
                "nearest_prototype": (nearest == truth).double().mean(),
            }
            named = {f"few_shot/{shots}_shot/{name}": value.float() for name, value in values.items()}
            pl_module.log_dict(named, batch_size=1, rank_zero_only=False)
