"""EATA: Efficient Test-Time Model Adaptation without Forgetting.

Niu et al., ICML 2022, https://arxiv.org/abs/2204.02610
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from zoo.core.card import Card
from zoo.core.distributed import sum_across_ranks, world_size
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.tent import batch_norm_parameters
from zoo.domain_adaptation.test_time import GradientAdaptation
from zoo.losses.entropy import entropy


class EATA(GradientAdaptation):
    r"""Tent on samples that are reliable and tell something new, held back where parameters mattered to the source.

    .. math:: L = \frac{\sum_i S_i\, e^{E_0 - H(p_i)} H(p_i)}{\sum_i S_i}
        + \beta \sum_k F_k (\theta_k - \theta_k^0)^2, \qquad
        S_i = 1[H(p_i) < E_0] \cdot 1[|\cos(p_i, m)| < \epsilon]

    m is the moving average of the predictions that were learnt from (0.9 of what it was), and filters from the second
    batch on. :math:`F_k` is the diagonal Fisher information of the unadapted network: mean squared gradients of the
    cross-entropy with its own predictions over batches of held-out source samples, whose labels are not looked at.
    They are the data's ``val``. A batch without any chosen sample makes no step. The weights of the samples are
    constants to the gradient. Predicted is before the step. On several ranks, samples are chosen and counted together.

    Batch: ``source`` {image, label}; at test {image, label}.

    Args:
        entropy_margin: :math:`E_0 / \log C` > 0, 0.4 in the paper; infinity (with ``reweight: false``) trusts all.
        redundancy_margin: ε > 0; 0.05 for ImageNet, 0.4 for CIFAR-10 in the paper: a certain prediction has a cosine of
            :math:`1 / \sqrt C` with a uniform average, and an ε below that leaves next to nothing to learn from.
            ``None`` calls nothing redundant.
        fisher_weight: β ≥ 0, 2000 for ImageNet and 1 for CIFAR-10 in the paper; 0 is what the paper calls ETA, and
            needs no source samples.
        fisher_samples: how many of them, 2000 in the paper; or as many as there are.
        reweight: ``False`` leaves out :math:`e^{E_0 - H}`.
        **kwargs: see :class:`~zoo.domain_adaptation.test_time.GradientAdaptation`. The paper steps by SGD with momentum
            0.9 at a rate of 0.00025 for ImageNet, 0.005 for CIFAR-10.

    Raises:
        UserError: for an argument out of its range; when tested, for a network without BatchNorm, and with a
            ``fisher_weight`` for data without ``val``.

    Source: Niu et al. 2022, arXiv 2204.02610, equations 2-9 and algorithm 1.
    """

    card = Card(
        title="Efficient Test-Time Model Adaptation without Forgetting",
        year=2022,
        paper="arXiv:2204.02610",
        family="domain_adaptation",
        roles=("source",),
    )

    test_arguments = (
        *GradientAdaptation.test_arguments,
        *("entropy_margin", "redundancy_margin", "fisher_weight", "fisher_samples", "reweight"),
    )

    def __init__(
        self,
        entropy_margin: float = 0.4,
        redundancy_margin: float | None = 0.05,
        fisher_weight: float = 2000.0,
        fisher_samples: int = 2000,
        reweight: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not entropy_margin > 0 or (reweight and math.isinf(entropy_margin)):
            more = " and, with reweight, finite" if reweight else ""
            raise UserError(f"EATA: entropy_margin={entropy_margin} must be greater than 0{more}")
        if redundancy_margin is not None and not redundancy_margin > 0:
            raise UserError(f"EATA: redundancy_margin={redundancy_margin} must be greater than 0, or null")
        if not fisher_weight >= 0 or fisher_samples < 1:
            raise UserError(
                f"EATA: fisher_weight={fisher_weight} must not be negative, fisher_samples={fisher_samples} at least 1"
            )
        self.entropy_margin, self.redundancy_margin, self.reweight = entropy_margin, redundancy_margin, reweight
        self.fisher_weight, self.fisher_samples = fisher_weight, fisher_samples
        self.average: Tensor | None = None  # m
        self.anchors: dict[str, tuple[Tensor, Tensor]] = {}  # by name: Fisher information and θ⁰

    def prepare_copy(self, network: Network) -> dict[str, nn.Parameter]:
        """As Tent; nothing was predicted yet."""
        self.average = None
        return batch_norm_parameters(self, network)

    def begin(self, images: Iterator[Any]) -> None:
        """Measure what mattered to the source."""
        if not self.fisher_weight:
            return
        squares, batches, seen = {name: torch.zeros_like(p) for name, p in self.now.named.items()}, 0, 0
        for x in self.held_out():
            logits = self.adapted(x)
            gradients = self.gradients(cross_entropy(logits, logits.argmax(dim=1)))
            squares = {name: value + gradients[name].square() for name, value in squares.items()}
            batches, seen = batches + 1, seen + int(sum_across_ranks(torch.tensor(len(logits), device=logits.device)))
            if seen >= self.fisher_samples:
                break
        self.anchors = {name: (squares[name] / batches, p.detach().clone()) for name, p in self.now.named.items()}

    def held_out(self) -> Iterator[Any]:
        """Images of the source that were not trained on."""
        data: Any = getattr(self.trainer, "datamodule", None)
        loaders: Any = None
        if data is not None:
            data.setup("validate")
            loaders = data.val_dataloader()
        if not isinstance(loaders, dict) or "val" not in loaders:
            raise UserError(
                "EATA: the Fisher information needs held-out source samples, and the data has no 'val': "
                "data.val_size, or fisher_weight: 0"
            )
        yield from self._inputs({"val": loaders["val"]}, 0)

    def learn(self, x: Any) -> Tensor:
        """Choose, weigh, step."""
        logits = self.adapted(x)
        entropies, chosen = entropy(logits), self.chosen(logits.detach())
        if (number := sum_across_ranks(chosen.sum())) == 0:
            return logits
        limit = self.entropy_margin * math.log(self.num_classes)
        weights = chosen * (limit - entropies.detach()).exp() if self.reweight else chosen
        loss = (weights * entropies).sum() * world_size() / number  # the mean over ranks is that over all chosen
        for name, (information, start) in self.anchors.items():
            loss = loss + self.fisher_weight * (information * (self.now.named[name] - start).square()).sum()
        self.step(self.gradients(loss))
        return logits

    @torch.no_grad()
    def chosen(self, logits: Tensor) -> Tensor:
        """1 for samples (B,) that are reliable and not redundant, else 0; the average follows them."""
        p, entropies = (logits.float() if logits.element_size() < 4 else logits).softmax(dim=1), entropy(logits)
        chosen = (entropies < self.entropy_margin * math.log(self.num_classes)).to(p)
        average = self.average
        if average is not None and self.redundancy_margin is not None:
            chosen = chosen * (cosine_similarity(p, average.unsqueeze(0)).abs() < self.redundancy_margin)
        number = sum_across_ranks(chosen.sum())
        if number > 0:
            mean = sum_across_ranks((chosen.unsqueeze(1) * p).sum(dim=0)) / number
            self.average = mean if average is None else torch.lerp(mean, average, 0.9)
        return chosen
