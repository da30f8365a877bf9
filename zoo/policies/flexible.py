"""A threshold for each class, lower where little has been learned yet."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zoo.core.distributed import gather_across_ranks
from zoo.core.errors import UserError, suggest
from zoo.policies.alignment import Alignment
from zoo.policies.policy import Policy

MAPPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "convex": lambda x: x / (2.0 - x),
    "linear": lambda x: x,
    "log": lambda x: (x + 1.0).log2(),
}


class FlexibleThreshold(Policy):
    r"""Curriculum pseudo-labeling: a class of which few samples are confidently predicted has a lower threshold.

    .. math:: w = \mathbb 1[\max_c p_c \ge \tau\, M(\beta(\hat y))], \quad
        \sigma(c) = \#\{n : \hat c_n = c\}, \quad
        \beta(c) = \frac{\sigma(c)}{\max(\max_k \sigma(k),\; N - \sum_k \sigma(k))}

    :math:`\hat c_n` is the class of sample n when it last reached the full threshold :math:`\tau`. A step is weighted
    by the counts of the steps before it, then counted; the first steps, with :math:`\beta = 0`, keep every sample, as
    in the released code. Samples of all ranks are counted. The counts move by what the batch changes; where a sample
    comes twice in a batch, its later confident prediction stands.

    Args:
        num_classes: number of classes C.
        threshold: :math:`\tau` in (0, 1].
        mapping: :math:`M`: ``"convex"`` :math:`x / (2 - x)`, ``"linear"`` :math:`x`, ``"log"``
            :math:`\ln(x + 1) / \ln 2`.
        warmup: whether samples that were never confident count in the denominator of :math:`\beta`; without it
            :math:`\beta(c) = \sigma(c) / \max_k \sigma(k)`, so that the best class is at the full threshold at once.
        alignment: from the number of classes to an :class:`~zoo.policies.alignment.Alignment`.

    Raises:
        UserError: if an argument is out of its range; in :meth:`forward` where the samples' numbers are unknown.

    Source: Zhang et al. 2021, arXiv 2110.08263: curriculum pseudo labeling, threshold warm-up, non-linear mapping.
    """

    sized_by_data: ClassVar[tuple[str, ...]] = ("classes",)
    classes: Tensor
    counts: Tensor
    total: Tensor

    def __init__(
        self,
        num_classes: int,
        threshold: float = 0.95,
        mapping: Literal["convex", "linear", "log"] = "convex",
        warmup: bool = True,
        alignment: Callable[[int], Alignment] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"FlexibleThreshold: threshold={threshold} must lie in (0, 1]")
        if mapping not in MAPPINGS:
            raise UserError(f"FlexibleThreshold: unknown mapping {mapping!r}.{suggest(mapping, MAPPINGS)}")
        self.threshold, self.mapping, self.warmup = threshold, mapping, warmup
        self.alignment = alignment(num_classes) if alignment else Alignment()
        self.register_buffer("classes", torch.empty(0, dtype=torch.int32))  # by sample number, -1 = never confident
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.long))  # σ
        self.register_buffer("total", torch.zeros((), dtype=torch.long))  # N

    def prepare(self, ids: Tensor) -> None:
        """Make room for the samples; what was counted on as many samples, before a checkpoint, stays."""
        size = int(ids.max()) + 1
        if self.classes.numel() == size and int(self.total) == len(ids):
            return
        self.classes = torch.full((size,), -1, dtype=torch.int32, device=self.counts.device)
        self.counts = torch.zeros_like(self.counts)
        self.total = torch.full_like(self.total, len(ids))

    def forward(self, logits: Tensor, index: Tensor | None = None, **evidence: Any) -> tuple[Tensor, Tensor]:
        """Targets (B,) and weights (B,) of 0 and 1; ``index`` (B,) numbers the samples."""
        if index is None or self.classes.numel() == 0:
            raise UserError(
                "FlexibleThreshold: it must know every unlabeled sample; batches need an 'index', and without a data"
                " module that has the role 'unlabeled', call prepare(ids) before training"
            )
        confidence, label = self.alignment(logits.detach().float().softmax(dim=1), **evidence).max(dim=1)
        weights = (confidence >= self.thresholds()[label]).to(logits.dtype)
        if self.training:
            self._count(index, label, confidence >= self.threshold)
        return label, weights

    def thresholds(self) -> Tensor:
        r"""The thresholds :math:`\tau\, M(\beta)` (C,)."""
        best = self.counts.max()
        if self.warmup:
            best = torch.maximum(best, self.total - self.counts.sum())
        return self.threshold * MAPPINGS[self.mapping](self.counts.float() / best.clamp_min(1))

    def _count(self, index: Tensor, label: Tensor, confident: Tensor) -> None:
        """Note the classes of the confident samples, and move the counts by what has changed."""
        size = self.classes.numel()
        seen = torch.stack([torch.where(confident, index.long(), size), label], dim=1)  # `size` = nobody
        samples, labels = gather_across_ranks(seen).unbind(dim=1)
        samples, order = samples.sort(stable=True)
        labels = labels[order]
        last = torch.cat([samples[1:] != samples[:-1], samples.new_ones(1, dtype=torch.bool)]) & (samples < size)
        samples = samples.clamp_max(size - 1)
        before = self.classes[samples]
        gone = last & (before >= 0)
        self.counts = self.counts.scatter_add(0, labels, last.long())
        self.counts = self.counts.scatter_add(0, before.clamp_min(0).long(), -gone.long())
        # In place and by what changes: the cost is that of the batch, and rows that do not last add nothing.
        self.classes.index_add_(0, samples, torch.where(last, labels.int() - before, 0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if (saved := state_dict.get(f"{prefix}classes")) is not None:  # sized by the data of that training
            self.classes = torch.full(saved.shape, -1, dtype=torch.int32, device=self.counts.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
