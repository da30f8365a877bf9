"""CoMatch: Semi-supervised Learning with Contrastive Graph Regularization.

Li, Xiong and Hoi, ICCV 2021, https://arxiv.org/abs/2011.11183
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from zoo.core.card import Card
from zoo.core.distributed import gather_across_ranks, gather_with_gradient
from zoo.core.errors import UserError
from zoo.core.heads import MLP, Head
from zoo.core.memory import MemoryBank
from zoo.losses.graph import graph_contrastive_loss, memory_smoothing, pseudo_label_graph
from zoo.policies.alignment import Alignment, QueueAlignment
from zoo.semi_supervised.base import SemiSupervised


class CoMatch(SemiSupervised):
    r"""Pseudo-labels are smoothed by a memory of embeddings, and embeddings follow the graph of the pseudo-labels.

    .. math:: L = L_x + \lambda_u \tfrac1{\mu B} \sum_b \mathbb 1[\max \tilde p_b \ge \tau]\, H(\tilde p_b, p(A(u_b)))
        + \lambda_c L_c(z(A(u)), z(A'(u)), \hat W(\tilde p))

    :math:`\tilde p` is the aligned prediction on the weak view, averaged with the predictions that the memory holds for
    samples of similar embeddings (:func:`~zoo.losses.memory_smoothing`). :math:`L_c` asks of the embeddings :math:`z`
    of two strong views to be as near as the graph :math:`\hat W` says
    (:func:`~zoo.losses.pseudo_label_graph`, :func:`~zoo.losses.graph_contrastive_loss`); graph and embeddings are
    those of all ranks. The memory is read before the step's weak and labeled samples enter it, with aligned predictions
    that are not yet smoothed, and with labels; it is not used before it is full.

    Follows the released CIFAR code; that for ImageNet takes weak and second strong views from the average of the
    weights, and compares with earlier batches too.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, strong_2, hidden_label (watched only)}.

    Args:
        threshold: :math:`\tau` in (0, 1].
        graph_threshold: inner product of two pseudo-labels below which they are not connected.
        smoothing: what is kept of the prediction, in [0, 1]; 1 = no memory.
        bank_size: rows of the memory; the release keeps five steps of :math:`(1 + \mu) B` samples.
        temperature: of the similarities, > 0.
        alignment: from the number of classes to an :class:`~zoo.policies.alignment.Alignment`.
        projection: from the number of features and of dimensions to the head that embeds.
        projection_dim: length of an embedding.
        unlabeled_weight: :math:`\lambda_u` ≥ 0.
        contrastive_weight: :math:`\lambda_c` ≥ 0.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Li, Xiong and Hoi 2021, arXiv 2011.11183, section 3.
    """

    card = Card(
        title="CoMatch: Semi-supervised Learning with Contrastive Graph Regularization",
        year=2021,
        paper="arXiv:2011.11183",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    unlabeled_views = ("weak", "strong", "strong_2")

    def __init__(
        self,
        threshold: float = 0.95,
        graph_threshold: float = 0.8,
        smoothing: float = 0.9,
        bank_size: int = 2560,
        temperature: float = 0.2,
        alignment: Callable[[int], Alignment] = QueueAlignment,
        projection: Callable[[int, int], Head] = MLP,
        projection_dim: int = 64,
        unlabeled_weight: float = 1.0,
        contrastive_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("threshold", threshold), ("graph_threshold", graph_threshold), ("smoothing", smoothing)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"CoMatch: {name}={value} must lie in [0, 1]")
        if temperature <= 0.0:
            raise UserError(f"CoMatch: temperature={temperature} must be positive")
        if bank_size < 1:
            raise UserError(f"CoMatch: bank_size={bank_size} must be at least 1; smoothing=1 makes no use of it")
        self.threshold, self.graph_threshold, self.smoothing = threshold, graph_threshold, smoothing
        self.bank_size, self.temperature, self.alignment_recipe = bank_size, temperature, alignment
        self.projection_recipe, self.projection_dim = projection, projection_dim
        self.unlabeled_weight, self.contrastive_weight = unlabeled_weight, contrastive_weight

    def build(self) -> None:
        """The networks, the projection and the memory."""
        super().build()
        self.projection = self.projection_recipe(self.network.num_features, self.projection_dim)
        self.alignment = self.alignment_recipe(self.num_classes)
        self.bank = MemoryBank(self.bank_size, self.projection_dim, probabilities=torch.zeros(self.num_classes))

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, D) to embeddings of length 1, in 32 bits."""
        return normalize(self.projection(features).float())

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels, the first strong view to the targets, and the graph of both strong views to the targets'."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        learning = [labeled["image"], unlabeled["strong"], unlabeled["strong_2"]]
        features, strong, strong_2, weak = self.together(learning, [unlabeled["weak"]], self.network.features)
        logits = self.network.logits(features)
        targets = self.targets(batch, logits, features.detach(), weak)
        weights = (targets.amax(dim=1) >= self.threshold).to(targets.dtype)
        self.watch(unlabeled, targets, weights)

        graph = pseudo_label_graph(gather_across_ranks(targets), self.graph_threshold)
        first, second = (gather_with_gradient(self.embed(x)) for x in (strong, strong_2))
        fitted = weights * cross_entropy(self.network.logits(strong), targets, reduction="none")
        return self.report(
            supervised=self.criterion(logits, labeled["label"]),
            unlabeled=self.unlabeled_weight * fitted.mean(),
            contrastive=self.contrastive_weight * graph_contrastive_loss(first, second, graph, self.temperature),
        )

    @torch.no_grad()
    def targets(self, batch: dict[str, dict[str, Tensor]], logits: Tensor, features: Tensor, weak: Tensor) -> Tensor:
        """Smoothed pseudo-labels (μB, C) from labeled and weak features; then both enter the memory."""
        aligned = self.alignment(self.network.logits(weak).float().softmax(dim=1), **self.evidence(batch, logits))
        near, memory = self.embed(weak), (self.bank.features, self.bank.column("probabilities"))
        share = torch.where(self.bank.full, self.smoothing, 1.0)
        targets = memory_smoothing(aligned, near, *memory, self.temperature, share)
        self.bank.update(near, probabilities=aligned)
        self.bank.update(self.embed(features), probabilities=one_hot(batch["labeled"]["label"], self.num_classes))
        return targets
