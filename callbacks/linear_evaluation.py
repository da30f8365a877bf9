"""What features are worth to a linear classifier, and how many labels it takes to see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.features import check_source, features_of
from datamodules.sources.base import Source
from datamodules.splits import generator, stratified
from zoo.core.errors import UserError, suggest

CLASSIFIERS = ("naive_bayes", "logistic")


class LinearEvaluation(Callback):
    r"""At every test, fits linear classifiers to the features of a few labelled samples, at several sizes.

    Gaussian naive Bayes with one variance per feature and logistic regression are both linear in the features. The
    generative one needs a number of samples that grows with :math:`\log D`, the discriminative one with :math:`D`: on
    few samples naive Bayes is ahead, on many logistic regression. Features are scaled to [0, 1] by the range of the
    samples fitted to. Logged is ``linear/<classifier>/<m>``, the accuracy on the source's test samples after ``m``
    training samples per class, the mean over ``repeats`` draws.

    Args:
        source: labelled samples; ``None`` takes the data's own source. Other labels than those trained on are welcome:
            the network is only asked for features.
        samples_per_class: sizes m.
        classifiers: of ``naive_bayes`` and ``logistic``.
        repeats: draws of the samples at every size.
        seed: of the draws.

    Raises:
        UserError: for an unknown classifier; at setup, where a class has fewer samples than asked for.

    Source: Zheng et al. 2023, "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications",
    arXiv 2302.02334, section 5; logistic regression is scikit-learn's with its defaults.
    """

    measures_tests = True

    def __init__(
        self,
        source: Source | None = None,
        samples_per_class: Sequence[int] = (2, 5, 10, 20, 50),
        classifiers: Sequence[str] = CLASSIFIERS,
        repeats: int = 5,
        seed: int = 0,
    ) -> None:
        for name in classifiers:
            if name not in CLASSIFIERS:
                raise UserError(f"LinearEvaluation: unknown classifier {name!r}.{suggest(name, CLASSIFIERS)}")
        if repeats < 1 or not samples_per_class or min(samples_per_class) < 2:
            raise UserError(
                f"LinearEvaluation: repeats={repeats} must be at least 1 and samples_per_class={samples_per_class} "
                "at least 2 each"
            )
        self.source = source
        self.samples_per_class, self.classifiers = sorted(samples_per_class), list(classifiers)
        self.repeats, self.seed = repeats, seed

    def _source(self, trainer: Trainer) -> Source:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        source: Source = self.source if self.source is not None else data.source
        return source

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before anything costs time."""
        if stage not in ("fit", "test"):
            return
        source = self._source(trainer)
        check_source("LinearEvaluation", source, trainer)
        labels = source.train().labels
        fewest = int(torch.bincount(labels[labels >= 0], minlength=source.num_classes).min())
        if fewest < self.samples_per_class[-1]:
            raise UserError(
                f"LinearEvaluation: samples_per_class={self.samples_per_class}, but a class of {source.name} has only "
                f"{fewest} samples"
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, fit, log."""
        source = self._source(trainer)
        samples = source.test()
        labelled = samples.subset((samples.labels >= 0).nonzero().flatten())
        test, truth = features_of(trainer, pl_module, labelled)
        train = source.train()
        draws = {
            (count, repeat): stratified(
                train.labels, torch.full((source.num_classes,), count), generator(self.seed, count, repeat)
            )
            for count in self.samples_per_class
            for repeat in range(self.repeats)
        }
        union = torch.cat(list(draws.values())).unique()  # every sample goes through the network once
        features, labels = features_of(trainer, pl_module, train.subset(union))
        values: dict[str, list[Tensor]] = {}
        for (count, _), chosen in draws.items():
            rows = torch.searchsorted(union, chosen)
            for name in self.classifiers:
                right = predict(name, features[rows], labels[rows], test, source.num_classes) == truth
                values.setdefault(f"linear/{name}/{count}", []).append(right.float().mean())
        pl_module.log_dict({name: torch.stack(found).mean() for name, found in values.items()}, batch_size=1)


def predict(classifier: str, features: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Fit ``classifier`` to features (N, D) and labels (N,); its labels for ``test`` (M, D), (M,)."""
    low, high = features.amin(dim=0), features.amax(dim=0)
    scale = (high - low).clamp_min(1e-12)
    features, test = (features - low) / scale, (test - low) / scale
    if classifier == "naive_bayes":
        from zoo.core.heads import NaiveBayes

        head = NaiveBayes(features.shape[1], num_classes)
        head.fit(features, labels)
        return head(test).argmax(dim=1)
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000).fit(features.numpy(), labels.numpy())
    return torch.from_numpy(fitted.predict(test.numpy()))
