"""Unsupervised Learning under Latent Label Shift.

Roberts, Mani, Garg and Lipton, NeurIPS 2022, https://arxiv.org/abs/2207.13179
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from zoo.core.card import Card
from zoo.core.distributed import gather_across_ranks
from zoo.core.errors import UserError
from zoo.core.label_shift import (
    MatchedAccuracy,
    adjust,
    class_frequencies,
    class_probabilities,
    prior_error,
)
from zoo.core.method import Method
from zoo.core.modes import evaluating


class LatentLabelShift(Method):
    r"""DDFA: classes without any label, from domains that differ in their class frequencies only.

    1. Discriminate: :math:`L = \tfrac1B \sum_i H(d_i, q(d|x_i))`, over domains of one size.
    2. Discretize: k-means of the vectors :math:`q(d|x)` into m clusters.
    3. Factorize: :math:`p(c|d) \approx p(c|y)\, p(y|d)`, non-negative.
    4. Adjust: :math:`p(y|x) = p(d|y)^+ q(d|x)`, clipped and normalised, and
       :math:`p(y|x, d) \propto p(d|y)\, p(y|x)` where the domain is known.

    Steps 2 and 3 follow every epoch, over training and validation samples, so that every checkpoint holds them. Calling
    the method gives :math:`\log p(y|x)` of a sample from all domains together; ``test`` and ``predict`` use the domain.
    The authors take the epoch with the smallest validation loss of the discriminator: ``RunCheckpoint`` with
    ``monitor: val/domain_loss``.

    A test logs ``accuracy`` after the best matching of found to true classes, ``prior_error``, the mean over domains of
    :math:`\lVert p(y|d) - \hat p(y|d) \rVert_1`, and what tells without labels whether the domains differ enough: the
    ``condition`` number of the estimate, and the ``rank`` of :math:`p(c|d)` above the noise of counting, over
    validation samples where there are any: a lower bound, because what was trained on looks more different than it is.

    Batch: ``unlabeled`` {image, domain}; at test {image, domain, label}.

    Args:
        num_domains: R, at least the number of classes. The network has as many outputs.
        clusters: m; ``None`` is three for each class, as for CIFAR in the paper.
        restarts: random starts of the factorization, of which the smallest error counts; 1 in the authors' code.
        seed: of k-means and the factorization.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: for fewer domains or clusters than classes; when tested, if the domains cannot be told apart.

    Source: Roberts et al. 2022, arXiv 2207.13179, algorithm 1; k-means and restarts as above.
    """

    card = Card(
        title="Unsupervised Learning under Latent Label Shift",
        year=2022,
        paper="arXiv:2207.13179",
        family="domain_adaptation",
        roles=("unlabeled",),
    )
    unlabeled_views: ClassVar[tuple[str, ...]] = ("image",)
    class_given_domain: Tensor
    rank: Tensor

    def __init__(
        self, num_domains: int, clusters: int | None = None, restarts: int = 10, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("num_domains", num_domains), ("clusters", clusters)):
            if value is not None and value < self.num_classes:
                raise UserError(
                    f"LatentLabelShift: {name}={value} must be at least {self.num_classes}, the number of classes"
                )
        if restarts < 1:
            raise UserError(f"LatentLabelShift: restarts={restarts} must be at least 1")
        self.num_domains, self.clusters = num_domains, clusters or 3 * self.num_classes
        self.restarts, self.seed = restarts, seed

    def build(self) -> None:
        """The discriminator, and p(y|d), zero as long as nothing is known of it."""
        self.network = self.network_recipe(self.num_domains)
        self.register_buffer("class_given_domain", torch.zeros(self.num_classes, self.num_domains))
        self.register_buffer("rank", torch.tensor(0))

    def setup(self, stage: str) -> None:
        """Check that data and module agree on the domains."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        if not hasattr(data, "unlabeled_dataloader"):
            raise UserError(
                f"LatentLabelShift: {type(data).__name__} has no domains without labels; see LabelShiftData"
            )
        if data.num_domains != self.num_domains:
            raise UserError(
                f"LatentLabelShift: num_domains={self.num_domains}, but {type(data).__name__} has {data.num_domains}"
            )

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Tell the domains apart."""
        unlabeled = batch["unlabeled"]
        return self.report(domain=cross_entropy(self.network(unlabeled["image"]), unlabeled["domain"]))

    def forward(self, x: Any) -> Tensor:
        """Log-probabilities (B, K) of the classes of samples from an unknown domain, all domains being as frequent."""
        return self.posterior(x).clamp_min(1e-12).log()

    def posterior(self, x: Any, domains: Tensor | None = None) -> Tensor:
        """p(y|x) (B, K), or p(y|x, d) where the domains (B,) are known."""
        with torch.autocast(self.device.type, enabled=False):
            found = class_probabilities(self.network(x).float().softmax(dim=1), self.class_given_domain)
            return found if domains is None else adjust(found, self.class_given_domain, domains)

    # Discretize and factorize -----------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Find the classes anew. Checkpoints are written afterwards."""
        self.find_classes()

    @torch.inference_mode(False)
    @torch.no_grad()
    def find_classes(self) -> None:
        """Steps 2 and 3 on all unlabelled samples of the data. Every process goes through the whole set."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        rows: dict[str, list[Tensor]] = {"probabilities": [], "domain": [], "held_out": []}
        with evaluating(self.network):
            for batch in data.unlabeled_dataloader():
                batch = self.trainer.strategy.batch_to_device(self.trainer.precision_plugin.convert_input(batch))
                with self.trainer.precision_plugin.forward_context():
                    batch["probabilities"] = self.network(batch["image"]).float().softmax(dim=1)
                for name, parts in rows.items():
                    parts.append(batch[name].cpu())
        probabilities, domains, held = map(torch.cat, rows.values())
        found, rank = class_frequencies(
            probabilities, domains, self.num_classes, self.clusters, held, self.restarts, self.seed
        )
        # the first process's for all of them
        self.class_given_domain = gather_across_ranks(found.float().contiguous().to(self.device))[: self.num_classes]
        self.rank = gather_across_ranks(torch.tensor([rank], device=self.device))[0]
        if self.trainer.training:
            self.log_dict({"classes/condition": self.condition, "classes/rank": self.rank.float()}, batch_size=1)

    @property
    def condition(self) -> Tensor:
        """Condition number of p(y|d)."""
        return torch.linalg.cond(self.class_given_domain.double()).float()

    def check_classes(self) -> None:
        """Before anything is measured or predicted: whether there are classes to speak of.

        Raises:
            UserError: if the domains cannot be told apart, or nothing was factorized.
        """
        if int(self.rank) == 0:  # a checkpoint from within the first epoch
            self.find_classes()
        rank = int(self.rank)
        if rank < 2:
            raise UserError(
                "LatentLabelShift: the domains cannot be told apart (rank 1), so that nothing is known of the classes: "
                "either their class frequencies are equal, or the discriminator has learnt nothing yet"
                if rank
                else "LatentLabelShift: p(y|d) is not known yet; train a whole epoch on a data module"
            )

    # Evaluation -------------------------------------------------------------------------------------------------------

    def build_metrics(self) -> MetricCollection:
        """Of the discriminator in validation, of the classes at test."""
        if self.trainer.testing:
            return MetricCollection({"accuracy": MatchedAccuracy(self.num_classes)})
        accuracy = MulticlassAccuracy(self.num_domains, average="micro")
        return MetricCollection({"domain_loss": MeanMetric(), "domain_accuracy": accuracy}, compute_groups=False)

    def evaluate(self, batch: Any, metrics: MetricCollection) -> None:
        """Validation looks at the domains alone, a test at the labels."""
        if self.trainer.testing:
            metrics.update(self.posterior(batch["image"], batch["domain"]), batch["label"])
            return
        logits = self.network(batch["image"])
        metrics["domain_loss"].update(cross_entropy(logits, batch["domain"]), len(logits))
        metrics["domain_accuracy"].update(logits, batch["domain"])

    def on_test_epoch_start(self) -> None:
        """Check that there is something to test."""
        self.check_classes()
        super().on_test_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Log also how far p(y|d) is off, and what tells without labels whether to trust it."""
        super().on_test_epoch_end()
        true = getattr(getattr(self.trainer, "datamodule", None), "class_given_domain", None)
        for name, metrics in self._metrics.items():
            values = {"condition": float(self.condition), "rank": float(self.rank)}
            matched: Any = metrics["accuracy"]
            if true is not None:
                values["prior_error"] = prior_error(self.class_given_domain.cpu(), true, matched.matching)
            self.log_dict({f"{name}/{key}": value for key, value in values.items()}, batch_size=1)

    def on_predict_start(self) -> None:
        """Check that there is something to predict."""
        self.check_classes()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Probabilities (B, K) of the found classes given sample and domain, with the samples' indices (B,)."""
        return {"index": batch["index"], "probabilities": self.posterior(batch["image"], batch["domain"])}
