"""SimMatch: Semi-supervised Learning with Similarity Matching.

Zheng et al., CVPR 2022, https://arxiv.org/abs/2203.06915
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.heads import MLP, Head
from zoo.core.memory import MemoryBank
from zoo.core.teachers import EMA
from zoo.losses.similarity import aggregate, instance_similarity_loss, similarities, unfold
from zoo.policies.alignment import Alignment, QueueAlignment
from zoo.semi_supervised.base import SemiSupervised


class SimMatch(SemiSupervised):
    r"""The strong view agrees with the weak one on the class, and on the labeled samples that it resembles.

    .. math:: L = L_x + \lambda_u \tfrac1{\mu B} \sum_b \mathbb 1[\max \tilde p_b \ge \tau]\, H(\tilde p_b, p(A(u_b)))
        + \lambda_i \tfrac1{\mu B} \sum_b H(\hat q_b, q(A(u_b)))

    :math:`q` is the softmax over the similarities of an embedding to those of the labeled samples, which a memory
    holds. Class and instance correct each other: :math:`\hat q` is :math:`q` of the weak view scaled by the aligned
    prediction :math:`p` for each sample's class (:func:`~zoo.losses.unfold`), and
    :math:`\tilde p = \alpha p + (1 - \alpha)\, \mathrm{agg}(q)`, where agg sums by class
    (:func:`~zoo.losses.aggregate`). The memory is read before the step's labeled samples enter it, and not used before
    it is full (the release waits for the second epoch).

    The defaults are the paper's small setting: the student labels, and each labeled sample's slot is a moving average
    of its embeddings, :math:`m \leftarrow \mathrm{normalize}(\beta m + (1 - \beta) z)`. The released ImageNet code is
    ``labeler="teacher", bank_momentum=0, threshold=0.7, unlabeled_weight=10, instance_weight=5``, with a queue of 256
    batches in the alignment and a teacher without running averages of its own in BatchNorm.

    Batch: ``labeled`` {image, label, index}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        threshold: :math:`\tau` in [0, 1].
        smoothing: :math:`\alpha` in [0, 1], what is kept of the prediction.
        temperature: of the similarities, > 0.
        bank_size: rows of a memory of the last labeled samples; ``None`` = one slot for each labeled sample.
        bank_momentum: :math:`\beta` in [0, 1], for slots.
        labeler: whose predictions and embeddings of weak views are targets: ``"student"``, or ``"teacher"``, the moving
            average of network and projection.
        alignment: from the number of classes to an :class:`~zoo.policies.alignment.Alignment`.
        projection: from the number of features and of dimensions to the head that embeds.
        projection_dim: length of an embedding.
        unlabeled_weight: :math:`\lambda_u` ≥ 0.
        instance_weight: :math:`\lambda_i` ≥ 0.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Raises:
        UserError: if an argument is out of its range; in a step without data to take the labeled samples from.

    Source: Zheng et al. 2022, arXiv 2203.06915, section 3.
    """

    card = Card(
        title="SimMatch: Semi-supervised Learning with Similarity Matching",
        year=2022,
        paper="arXiv:2203.06915",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self,
        threshold: float = 0.95,
        smoothing: float = 0.9,
        temperature: float = 0.1,
        bank_size: int | None = None,
        bank_momentum: float = 0.7,
        labeler: Literal["student", "teacher"] = "student",
        alignment: Callable[[int], Alignment] = QueueAlignment,
        projection: Callable[[int, int], Head] = MLP,
        projection_dim: int = 128,
        unlabeled_weight: float = 1.0,
        instance_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("threshold", threshold), ("smoothing", smoothing), ("bank_momentum", bank_momentum)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"SimMatch: {name}={value} must lie in [0, 1]")
        if temperature <= 0.0:
            raise UserError(f"SimMatch: temperature={temperature} must be positive")
        if bank_size is not None and bank_size < 1:
            raise UserError(f"SimMatch: bank_size={bank_size} must be at least 1, or None")
        if labeler not in ("student", "teacher"):
            raise UserError(f"SimMatch: labeler={labeler!r} must be 'student' or 'teacher'")
        self.threshold, self.smoothing, self.temperature = threshold, smoothing, temperature
        self.bank_size, self.bank_momentum, self.labeler = bank_size, bank_momentum, labeler
        self.alignment_recipe, self.projection_recipe, self.projection_dim = alignment, projection, projection_dim
        self.unlabeled_weight, self.instance_weight = unlabeled_weight, instance_weight

    def build(self) -> None:
        """The networks, the projection, its average where the teacher labels, and the memory."""
        super().build()
        self.projection = self.projection_recipe(self.network.num_features, self.projection_dim)
        if self.labeler == "teacher":
            self.projection_teacher = EMA(self.projection, self.momentum)
        self.alignment = self.alignment_recipe(self.num_classes)
        self.bank = self.make_bank(self.bank_size or 0)

    def make_bank(self, size: int) -> MemoryBank:
        """An empty memory."""
        return MemoryBank(size, self.projection_dim, label=torch.tensor(0), index=torch.tensor(-1))

    def prepare_for(self, data: Any) -> None:
        """Make a slot for each labeled sample, unless a checkpoint brought them."""
        super().prepare_for(data)
        if self.bank_size is None and "labeled" in getattr(data, "roles", {}):
            ids = data.roles["labeled"].samples.ids.unique().to(self.bank.column("index").device)
            if not torch.equal(ids, self.bank.column("index")):
                self.bank = self.make_bank(len(ids)).to(ids.device).train(self.bank.training)
                self.bank.index = ids

    @property
    def teacher_pairs(self) -> Iterator[tuple[EMA, nn.Module]]:
        """The average of the network, and that of the projection where it labels."""
        yield from super().teacher_pairs
        if self.labeler == "teacher":
            yield self.projection_teacher, self.projection

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels, and the strong view to the weak view's classes and similarities."""
        terms, *_ = self.terms(batch)
        return self.report(**terms)

    def terms(self, batch: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The terms of the loss, the features of the strong views (μB, D), and their targets (μB, C)."""
        if not self.bank.size:
            raise UserError("SimMatch: no labeled samples are known; train with a data module, or set bank_size")
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        weak = [unlabeled["weak"]] if self.labeler == "student" else []
        learning = [labeled["image"], unlabeled["strong"]]
        features, strong, *weak = self.together(learning, weak, self.network.features)
        logits = self.network.logits(features)
        memory, labels, full = self.bank.features, self.bank.column("label"), self.bank.full

        with torch.no_grad():
            prediction, embedding, own = self.targeting(batch, features, weak)
            aligned = self.alignment(prediction, **self.evidence(batch, logits))
            instances = similarities(embedding, memory, self.temperature)
            share = torch.where(full, self.smoothing, 1.0)
            targets = torch.lerp(aggregate(instances, labels, self.num_classes), aligned, share)
            weights = (targets.amax(dim=1) >= self.threshold).to(targets.dtype)
            self.remember(labeled, own)
        self.watch(unlabeled, targets, weights)

        similar = normalize(self.projection(strong).float())
        instance = instance_similarity_loss(similar, memory, unfold(instances, aligned, labels), self.temperature)
        fitted = weights * cross_entropy(self.network.logits(strong), targets, reduction="none")
        terms = {
            "supervised": self.criterion(logits, labeled["label"]),
            "unlabeled": self.unlabeled_weight * fitted.mean(),
            "instance": self.instance_weight * full * instance,
        }
        return terms, strong, targets

    def targeting(
        self, batch: dict[str, dict[str, Tensor]], features: Tensor, weak: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities and embeddings of the weak views, and embeddings of the labeled samples."""
        network: Any = self.network
        projection: Any = self.projection
        parts = [*weak, features]
        if self.labeler == "teacher":
            network, projection = self.teacher.module, self.projection_teacher.module
            images = [batch["unlabeled"]["weak"], batch["labeled"]["image"]]
            parts = list(network.features(torch.cat(images)).split([len(x) for x in images]))
        embedding, own = (normalize(projection(x).float()) for x in parts)
        return network.logits(parts[0]).float().softmax(dim=1), embedding, own

    def remember(self, labeled: dict[str, Tensor], own: Tensor) -> None:
        """Put the embeddings of the labeled samples into the memory."""
        index, label = labeled["index"], labeled["label"]
        if self.bank_size is not None:
            return self.bank.update(own, label=label, index=index)
        slots = torch.searchsorted(self.bank.column("index"), index)
        mean = normalize(torch.lerp(own, self.bank.features[slots], self.bank_momentum))
        return self.bank.put(slots, mean, label=label, index=index)
