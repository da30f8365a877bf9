"""T3A: Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization.

Iwasawa and Matsuo, NeurIPS 2021, https://openreview.net/forum?id=e_yvNqkJKAW
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.card import Card
from zoo.core.distributed import gather_across_ranks, world_size
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.test_time import TestTimeAdaptation
from zoo.losses.entropy import entropy


class T3A(TestTimeAdaptation):
    r"""The classifier's weights give way to the means of features that are surely of a class.

    .. math:: S_c^0 = \{w_c\}, \qquad S_c^t = S_c^{t-1} \cup \{z_i : \hat y_i = c\}, \qquad
        \text{logit}_c(z) = z^\top \frac{\mu_c}{\lVert \mu_c \rVert}, \quad
        \mu_c = \sum_{s \in S_c} \frac{s}{\lVert s \rVert}

    z are the features before the linear head (w, b), :math:`\hat y_i` the head's own prediction. Of every class only
    the M supports of least entropy under the head are kept, the weights among them on equal terms. There are no
    gradients. A batch is predicted with supports that include it, and those of all ranks.

    Batch: ``source`` {image, label}; at test {image, label}.

    Args:
        supports: M ≥ 1 for every class; ``None`` keeps all. The authors choose among 1, 5, 20, 50, 100 and all by the
            validation set; their code, asked for all, loses the least certain support of every class at every batch.
        **kwargs: see :class:`~zoo.domain_adaptation.test_time.TestTimeAdaptation`.

    Raises:
        UserError: for fewer supports than 1; when tested, for a head that is not linear.

    Source: Iwasawa and Matsuo 2021, NeurIPS 34, equations 4-7 and algorithm 1.
    """

    card = Card(
        title="Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization",
        year=2021,
        paper="https://openreview.net/forum?id=e_yvNqkJKAW",
        family="domain_adaptation",
        roles=("source",),
    )

    test_arguments = ("mode", "supports")

    def __init__(self, supports: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if supports is not None and supports < 1:
            raise UserError(f"T3A: supports={supports} must be at least 1, or null for all")
        self.supports = supports
        self.memory: Supports | None = None

    def prepare_copy(self, network: Network) -> dict[str, nn.Parameter]:
        """The head's weights are the first supports."""
        head: Any = network.head
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"T3A: the head must be linear, as its weights are the first supports; {type(head).__name__}"
            )
        self.memory = Supports(self.num_classes, self.supports)
        with torch.no_grad():
            self.memory.add(head.weight.detach(), head(head.weight))
        return {}

    @torch.no_grad()
    def adapt(self, x: Any) -> Tensor:
        """Remember the batch, then compare it with what is remembered."""
        assert self.memory is not None  # made with the copy
        features = self.adapted.features(x)
        self.memory.add(*from_all_ranks(features, self.adapted.logits(features)))
        with torch.autocast(features.device.type, enabled=False):
            directions = self.memory.directions()
            return features.to(directions) @ directions.T


class Supports:
    """The M features of least entropy for every class; where all are kept, only their sums.

    Args:
        num_classes: C.
        size: M, or ``None`` for all.
    """

    def __init__(self, num_classes: int, size: int | None) -> None:
        self.num_classes, self.size = num_classes, size
        self.sums = torch.zeros(())
        self.features = self.labels = self.entropies = torch.zeros(0)

    def add(self, features: Tensor, logits: Tensor) -> None:
        """Take in features (B, D) with the head's logits (B, C); rows of logits that are NaN are passed over."""
        features = features.float() if features.element_size() < 4 else features
        features = F.normalize(features.nan_to_num(), dim=1)
        labels, entropies = logits.nan_to_num().argmax(dim=1), entropy(logits).nan_to_num(nan=torch.inf)
        if self.size is None:
            members = F.one_hot(labels, self.num_classes).to(features) * entropies.isfinite().unsqueeze(1)
            self.sums = self.sums + per_class(members, features)
            return
        if len(self.features):
            features = torch.cat([self.features, features])
            labels, entropies = torch.cat([self.labels, labels]), torch.cat([self.entropies, entropies])
        self.features, self.labels, self.entropies = self.keep(features, labels, entropies)
        members = F.one_hot(self.labels, self.num_classes).to(features) * self.entropies.isfinite().unsqueeze(1)
        self.sums = per_class(members, self.features)

    def keep(self, features: Tensor, labels: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C · M rows, M of every class; where a class has fewer, empty ones of infinite entropy."""
        assert self.size is not None
        order = entropies.argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]  # by class, and by entropy within
        labels, members = labels[order], F.one_hot(labels, self.num_classes)
        counts = members.sum(dim=0)
        place = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels]
        rows = self.num_classes * self.size  # one more takes what is not kept
        slots = torch.where(place < self.size, labels * self.size + place, rows)
        kept = features.new_zeros(rows + 1, features.shape[1]).index_copy(0, slots, features[order])
        sure = entropies.new_full((rows + 1,), torch.inf).index_copy(0, slots, entropies[order])
        return kept[:-1], torch.arange(rows, device=labels.device) // self.size, sure[:-1]

    def directions(self) -> Tensor:
        """One unit vector for every class (C, D); zeros for a class without support."""
        return F.normalize(self.sums, dim=1)


def per_class(members: Tensor, features: Tensor) -> Tensor:
    """Sums (C, D) of the features (B, D) of every class's members (B, C), under autocast too in 32 bits."""
    with torch.autocast(features.device.type, enabled=False):
        return members.T @ features


def from_all_ranks(*rows: Tensor) -> tuple[Tensor, ...]:
    """Rows of every rank, whose numbers may differ; those that fill up are NaN."""
    if world_size() == 1:
        return rows
    most = int(gather_across_ranks(torch.tensor([len(rows[0])], device=rows[0].device)).max())
    padded = [F.pad(x, (0, 0, 0, most - len(x)), value=torch.nan) for x in rows]
    return tuple(gather_across_ranks(x) for x in padded)
