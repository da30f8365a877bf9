"""LOOK: Rethinking Supervised Pre-training for Better Downstream Transferring.

Feng et al., ICLR 2022, https://arxiv.org/abs/2110.06014
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.memory import MemoryBank
from zoo.core.network import Network
from zoo.losses import nearest_neighbor_loss
from zoo.semi_supervised.supervised import Supervised


class LOOK(Supervised):
    r"""Features whose nearest neighbours are of the same class, so that a class may stay several clusters.

    .. math:: L = \tfrac1B \sum_i -\log \frac{\sum_{j \in N_k(i), y_j = y_i} e^{s_{ij} / \sigma}}
        {\sum_{j \in N_k(i)} e^{s_{ij} / \sigma}} + H(y_i, h(\bar f_i))

    Cross-entropy draws all of a class to one direction and loses what tells its members apart, which a later task may
    need. Here most of the k nearest must agree and the rest of the class may lie anywhere. Neighbours come from a queue
    of the last samples' features as the average of the weights sees them, the sample's own ones left out; s is the
    cosine. The head h, which the evaluation needs, learns on features :math:`\bar f` without a gradient to them.

    Batch: ``labeled`` {image, label, index}.

    Args:
        neighbors: k ≥ 1.
        temperature: σ > 0.
        memory_size: rows of the queue, ≥ 1.
        momentum: of the average, which fills the queue and is evaluated.
        **kwargs: see :class:`~zoo.semi_supervised.supervised.Supervised`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Feng et al. 2022, arXiv 2110.06014, section 3. No code was released; the head is ours.
    """

    card = Card(
        title="Rethinking Supervised Pre-training for Better Downstream Transferring",
        year=2022,
        paper="arXiv:2110.06014",
        family="semi_supervised",
        roles=("labeled",),
    )
    memory: MemoryBank

    def __init__(
        self,
        neighbors: int = 200,
        temperature: float = 0.1,
        memory_size: int = 16384,
        momentum: float = 0.999,
        **kwargs: Any,
    ) -> None:
        super().__init__(momentum=momentum, **kwargs)
        if neighbors < 1 or memory_size < 1:
            raise UserError(f"LOOK: neighbors={neighbors} and memory_size={memory_size} must be at least 1")
        if temperature <= 0.0:
            raise UserError(f"LOOK: temperature={temperature} must be positive")
        self.neighbors, self.temperature, self.memory_size = neighbors, temperature, memory_size

    def build(self) -> None:
        """The network, its average, and the queue."""
        super().build()
        empty = {"label": torch.tensor(-1), "index": torch.tensor(-1)}
        self.memory = MemoryBank(self.memory_size, self.network.num_features, **empty)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Every sample among its neighbours of earlier steps and of this one."""
        labeled = batch["labeled"]
        labels, index = labeled["label"], labeled["index"]
        features, teacher = self.network.features(labeled["image"]), cast(Network, self.teacher.module)
        with torch.no_grad():
            self.memory.update(normalize(teacher.features(labeled["image"]).float(), dim=1), label=labels, index=index)
        loss = nearest_neighbor_loss(
            normalize(features.float(), dim=1),
            labels,
            self.memory.features,
            self.memory.column("label"),
            self.neighbors,
            self.temperature,
            excluded=index.unsqueeze(1) == self.memory.column("index"),
        )
        return self.report(
            neighbors=loss.mean(), supervised=self.criterion(self.network.logits(features.detach()), labels)
        )
