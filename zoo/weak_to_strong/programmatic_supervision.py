"""Data Programming: labels from labelling functions that vote.

Ratner et al., NeurIPS 2016, https://arxiv.org/abs/1605.07723
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.label_models import LabelModel
from zoo.core.ranking import MeanAUROC
from zoo.core.votes import is_conflicting, is_covered, vote_counts
from zoo.weak_to_strong.base import OnePass


class ProgrammaticSupervision(OnePass):
    r"""A label model learns from votes alone how far to trust each labelling function, and labels the samples.

    .. math:: P(y | v) \propto \pi_y \exp \sum_j T_{j, v_j, y}

    One pass collects the votes; then the model is fitted, which takes seconds, and ``zoo predict`` writes
    ``probabilities`` (N, C) and ``weights`` (N,), 0 where no function votes. The end model that learns from them is any
    student of this family.

    Evaluation logs ``accuracy`` over all samples, where ties and silence are left to the class balance;
    ``covered_accuracy`` over those with a vote; ``majority_accuracy``, that of counting votes, which the model must
    beat; ``auroc``; ``coverage`` and ``conflict``, the shares of samples with a vote and with two that differ.

    Batch: ``votes`` {votes (B, M), -1 = abstain; index; hidden_label (not read)}. Evaluation: {votes, label, index}.

    Args:
        label_model: recipe, from the number of classes: :class:`~zoo.core.label_models.DawidSkene`,
            :class:`~zoo.core.label_models.MatrixCompletion`, :class:`~zoo.core.label_models.TripletMoments`,
            :class:`~zoo.core.label_models.MajorityVote` or :class:`~zoo.core.label_models.WeightedVote`.
        num_classes: C; the command line takes it from the data.

    Raises:
        UserError: for a label model that is built already; whatever the label model refuses.

    Source: Ratner et al. 2016, arXiv 1605.07723, and those of the label models.
    """

    card = Card(
        title="Data Programming: Creating Large Training Sets, Quickly",
        year=2016,
        paper="arXiv:1605.07723",
        family="weak_to_strong",
        roles=("votes",),
    )
    role: ClassVar[str] = "votes"
    columns: ClassVar[tuple[str, ...]] = ("votes",)

    def __init__(self, label_model: Callable[[int], LabelModel], num_classes: int) -> None:
        if isinstance(label_model, nn.Module):
            raise UserError(
                "ProgrammaticSupervision: label_model must be a recipe such as DawidSkene or functools.partial("
                f"DawidSkene, abstain='ignore'), not a built {type(label_model).__name__}"
            )
        super().__init__(network=label_model, num_classes=num_classes)

    @property
    def label_model(self) -> LabelModel:
        """What is fitted."""
        model: Any = self.network
        return model

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Keep the votes."""
        rows, votes = batch["votes"], batch["votes"]["votes"]
        if self.logs_now:
            self.observe(coverage=is_covered(votes).float().mean(), conflict=is_conflicting(votes).float().mean())
        small = torch.int8 if self.num_classes <= 127 else torch.int32
        return self.collect({"index": rows["index"], "votes": votes.to(small)})

    def fit_rows(self, rows: dict[str, Tensor]) -> None:
        """Fit the label model to the votes; it gets the labelled few only if it asks for them."""
        data: Any = getattr(self.trainer, "datamodule", None)
        labeled = None
        if self.label_model.reads_labeled and hasattr(data, "labeled_votes"):
            labeled = data.labeled_votes()
        names = getattr(data, "function_names", None)
        names = names if names is not None and len(names) == rows["votes"].shape[1] else None
        self.label_model.fit(rows["votes"], labeled=labeled, names=names)

    def build_metrics(self) -> MetricCollection:
        """Means over samples."""
        names = ("accuracy", "covered_accuracy", "majority_accuracy", "coverage", "conflict")
        metrics: dict[str, Metric | MetricCollection] = {name: MeanMetric(nan_strategy="ignore") for name in names}
        metrics["auroc"] = MeanAUROC(self.num_classes, ignore_index=-1)
        return MetricCollection(metrics, compute_groups=False)  # "disable" would drop the weights, too

    def evaluate(self, batch: Any, metrics: MetricCollection) -> None:
        """Labels -1 are not known and only count for coverage and conflict."""
        votes, labels = batch["votes"], batch["label"]
        covered, known = is_covered(votes).float(), (labels >= 0).float()
        logits = self(votes)
        right = (logits.argmax(dim=1) == labels).float()
        # the balance, being less than a vote, decides ties
        counted = (vote_counts(votes, self.num_classes) + self.label_model.balance / 2).argmax(dim=1)
        metrics["accuracy"].update(right, known)
        metrics["covered_accuracy"].update(right, known * covered)
        metrics["majority_accuracy"].update((counted == labels).float(), known)
        metrics["auroc"].update(logits, labels)
        metrics["coverage"].update(covered)
        metrics["conflict"].update(is_conflicting(votes).float())

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Probabilities (B, C), and weights (B,) that are 0 where nobody votes."""
        votes = batch["votes"]
        weights = is_covered(votes).float()
        return {"index": batch["index"], "probabilities": self.label_model.posterior(votes), "weights": weights}
