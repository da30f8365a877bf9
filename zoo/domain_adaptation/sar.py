"""SAR: Towards Stable Test-Time Adaptation in Dynamic Wild World.

Niu et al., ICLR 2023, https://arxiv.org/abs/2302.12400
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.core.batch_norm import normalise_by_batch
from zoo.core.card import Card
from zoo.core.distributed import sum_across_ranks, world_size
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.test_time import GradientAdaptation
from zoo.losses.entropy import entropy
from zoo.optim.sam import SAM

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


class SAR(GradientAdaptation):
    r"""Entropy minimization of reliable samples towards flat minima, which begins anew before it collapses.

    .. math:: \min_\theta \max_{\lVert \epsilon \rVert \le \rho}
        \frac{\sum_i S_i H(p_i; \theta + \epsilon)}{\sum_i S_i}, \qquad S_i = 1[H(p_i) < E_0]

    θ are scales and shifts of BatchNorm, LayerNorm and GroupNorm but for the top layers'. The gradient at
    :math:`\theta + \hat\epsilon` is that of samples which are reliable there as well. Where the moving average of their
    entropies (0.9 of what it was) falls below ``collapse``, a few confident answers to everything are near, and all is
    put back as trained, the average too (in the authors' code it stays, and may put back the next batch too).
    Predicted is before the step. On several ranks samples count together.

    Batch: ``source`` {image, label}; at test {image, label}.

    Args:
        entropy_margin: :math:`E_0 / \log C` > 0, 0.4 in the paper.
        rho: ρ ≥ 0, 0.05 in the paper.
        collapse: average entropy, in nats, below which all is put back; 0.2 in the paper, for 1000 classes. 0: never.
        skip: names of top parts of the backbone (with all inside them) whose norms stay, where there are any.
        **kwargs: see :class:`~zoo.domain_adaptation.test_time.GradientAdaptation`. The paper steps by SGD with momentum
            0.9 at a rate of 0.00025 (ResNet-50) or 0.001 (ViT-B).

    Raises:
        UserError: for an argument out of its range; when tested, where no such norm is left.

    Source: Niu et al. 2023, arXiv 2302.12400, equations 2-5 and algorithm 1; skipped layers as in the authors' code.
    """

    card = Card(
        title="Towards Stable Test-Time Adaptation in Dynamic Wild World",
        year=2023,
        paper="arXiv:2302.12400",
        family="domain_adaptation",
        roles=("source",),
    )

    test_arguments = (*GradientAdaptation.test_arguments, "entropy_margin", "rho", "collapse", "skip")

    def __init__(
        self,
        entropy_margin: float = 0.4,
        rho: float = 0.05,
        collapse: float = 0.2,
        skip: tuple[str, ...] = ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm"),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not entropy_margin > 0 or not collapse >= 0:
            raise UserError(
                f"SAR: entropy_margin={entropy_margin} must be greater than 0, collapse={collapse} not negative"
            )
        self.entropy_margin, self.collapse, self.skip = entropy_margin, collapse, tuple(skip)
        self.sam = SAM(rho)
        self.average: Tensor | None = None

    def prepare_copy(self, network: Network) -> dict[str, nn.Parameter]:
        """Norms but for the top ones; BatchNorm normalises by the batch."""
        self.average = None
        normalise_by_batch(network)
        found: dict[str, nn.Parameter] = {}
        for name, part in network.named_modules():
            inner = name.removeprefix("backbone.model.")
            if isinstance(part, NORMS) and not any(f"{inner}.".startswith(f"{top}.") for top in self.skip):
                found |= {f"{name}.{leaf}": p for leaf, p in part.named_parameters(recurse=False)}
        if not found:
            raise UserError(f"SAR: no BatchNorm, LayerNorm or GroupNorm is left to adapt; skip={list(self.skip)}")
        return found

    def learn(self, x: Any) -> Tensor:
        """Climb, descend from there, and see whether it has gone too far."""
        logits = self.adapted(x)
        entropies = entropy(logits)
        margin = self.entropy_margin * math.log(self.num_classes)
        reliable = (entropies.detach() < margin).to(entropies)
        with self.sam.ascended(self.adapted, self.gradients(joint_mean(entropies, reliable))):
            above = entropy(self.adapted(x))
            reliable = reliable * (above.detach() < margin)
            loss = joint_mean(above, reliable)
            gradients = self.gradients(loss)
        if sum_across_ranks(reliable.sum()) > 0:
            self.step(gradients)
            value = sum_across_ranks(loss.detach()) / world_size()
            self.average = value if self.average is None else torch.lerp(value, self.average, 0.9)
            if self.average < self.collapse:
                self.reset()
        return logits


def joint_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of values (B,) over all ranks: the mean over ranks of what each gets. 0 where no weight is."""
    return (weights * values).sum() * world_size() / sum_across_ranks(weights.sum()).clamp(min=1)
