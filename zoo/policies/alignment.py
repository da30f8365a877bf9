"""Distribution alignment: predictions are scaled so that their long-run mean is a given prior."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.distributed import mean_across_ranks
from zoo.core.errors import UserError

SMALLEST = 1e-12  # of a mean prediction that is divided by


class Alignment(nn.Module):
    """Base of the alignments: probabilities (B, C) → probabilities (B, C).

    They are handed what the policies are, see :class:`~zoo.policies.policy.Policy`.
    """

    def forward(self, probabilities: Tensor, **evidence: Any) -> Tensor:
        """Change nothing."""
        return probabilities


class MovingAlignment(Alignment):
    r"""Alignment by the moving average of the predictions.

    .. math:: \tilde p = \mathrm{normalize}\!\left(p \cdot \frac{\pi}{\bar p}\right), \quad
        \bar p \leftarrow m\, \bar p + (1 - m)\, \mathbb{E}_B\, p

    :math:`\bar p` starts at the prior, moves before it is used, takes the mean over all ranks, and moves only in
    training mode. The prior :math:`\pi` is uniform unless given.

    Args:
        num_classes: number of classes C.
        momentum: :math:`m` in [0, 1).
        prior: class frequencies to align with, C non-negative numbers that are normalised to sum to 1.

    Raises:
        UserError: if ``momentum`` is out of its range; if ``prior`` has another length than C, or a negative entry.

    Source: Berthelot et al. 2020, arXiv 1911.09785, section 3.1, with the moving average of Sohn et al. 2020.
    """

    prior: Tensor
    mean: Tensor

    def __init__(self, num_classes: int, momentum: float = 0.999, prior: list[float] | None = None) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"{type(self).__name__}: momentum={momentum} must lie in [0, 1)")
        if prior is not None and (len(prior) != num_classes or min(prior) < 0 or sum(prior) <= 0):
            raise UserError(f"MovingAlignment: prior={prior} must be {num_classes} non-negative numbers")
        self.momentum = momentum
        frequencies = torch.tensor(prior) if prior is not None else torch.ones(num_classes)
        self.register_buffer("prior", frequencies / frequencies.sum())
        self.register_buffer("mean", self.prior.clone())

    def forward(self, probabilities: Tensor, **evidence: Any) -> Tensor:
        """Aligned probabilities (B, C), rows summing to 1."""
        if self.training:
            batch_mean = mean_across_ranks(probabilities.detach().mean(dim=0)).to(self.mean.dtype)
            # A new tensor, not an update in place: DDP may still hold the old one for its buffer broadcast.
            self.mean = torch.lerp(batch_mean, self.mean, self.momentum)
        return scaled(probabilities, self.prior / self.mean.clamp_min(1e-6))


class QueueAlignment(Alignment):
    r"""Alignment by the mean prediction of the last batches.

    .. math:: \tilde p = \mathrm{normalize}\!\left(p \cdot \frac{\pi}{\bar p}\right), \quad
        \bar p = \tfrac1K \sum_{k < K} \mathbb{E}_{B_{t-k}}\, p

    The batch enters the queue before the queue is used, over all ranks, and in training mode only. As long as it is
    not full, :math:`K` is the number of batches there are; before the first one nothing is changed.

    Args:
        num_classes: number of classes C.
        length: batches in the queue; ReMixMatch 128, CoMatch and ShrinkMatch 32, on ImageNet 256.
        prior: class frequencies to align with, C non-negative numbers that are normalised to sum to 1; uniform unless
            given.

    Raises:
        UserError: if ``length`` is below 1; if ``prior`` has another length than C, or a negative entry.

    Source: Berthelot et al. 2020, arXiv 1911.09785, section 3.1; Li et al. 2021, arXiv 2011.11183; Yang et al. 2023,
    arXiv 2308.06777.
    """

    prior: Tensor
    queue: Tensor
    count: Tensor

    def __init__(self, num_classes: int, length: int = 32, prior: list[float] | None = None) -> None:
        super().__init__()
        if length < 1:
            raise UserError(f"QueueAlignment: length={length} must be at least 1")
        if prior is not None and (len(prior) != num_classes or min(prior) < 0 or sum(prior) <= 0):
            raise UserError(f"QueueAlignment: prior={prior} must be {num_classes} non-negative numbers")
        frequencies = torch.tensor(prior) if prior is not None else torch.ones(num_classes)
        self.register_buffer("prior", frequencies / frequencies.sum())
        self.register_buffer("queue", torch.zeros(length, num_classes))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, probabilities: Tensor, **evidence: Any) -> Tensor:
        """Aligned probabilities (B, C), rows summing to 1."""
        if self.training:
            row = mean_across_ranks(probabilities.detach().mean(dim=0)).to(self.queue.dtype)
            self.queue, self.count = pushed(self.queue, row, self.count), self.count + 1
        mean = self.queue.sum(dim=0) / self.count.clamp(1, len(self.queue))
        mean = torch.where(self.count > 0, mean, self.prior)
        return scaled(probabilities, self.prior / mean.clamp_min(SMALLEST))


class LabeledAlignment(Alignment):
    r"""Alignment of the mean unlabeled prediction with the mean labeled one.

    .. math:: \tilde p = \mathrm{normalize}\!\left(p \cdot
        \frac{\mathbb{E}\, p(x)}{\mathbb{E}\, p(u)}\right)

    The released code takes a moving average of the labeled predictions and a mean over the last 128 batches of the
    unlabeled ones, both starting uniform: the defaults. ``length=None`` is a moving average on both sides, as in USB;
    ``momentum=0`` and ``length=1`` are the means of the step's batches. Both move before they are used, over all ranks,
    and in training mode only.

    Args:
        num_classes: number of classes C.
        momentum: of the moving averages, in [0, 1).
        length: batches over which the unlabeled mean runs; ``None`` = a moving average.

    Raises:
        UserError: if an argument is out of its range; in :meth:`forward` where no labeled logits are given.

    Source: Berthelot et al. 2022, arXiv 2106.04732: distribution alignment.
    """

    labeled_mean: Tensor
    queue: Tensor
    count: Tensor

    def __init__(self, num_classes: int, momentum: float = 0.999, length: int | None = 128) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"LabeledAlignment: momentum={momentum} must lie in [0, 1)")
        if length is not None and length < 1:
            raise UserError(f"LabeledAlignment: length={length} must be at least 1")
        self.momentum, self.length = momentum, length
        self.register_buffer("labeled_mean", torch.full((num_classes,), 1.0 / num_classes))
        self.register_buffer("queue", torch.full((length or 1, num_classes), 1.0 / num_classes))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, probabilities: Tensor, labeled: tuple[Tensor, Tensor] | None = None, **evidence: Any) -> Tensor:
        """Aligned probabilities (B, C); ``labeled`` holds the labeled samples' logits and labels."""
        if labeled is None:
            raise UserError("LabeledAlignment: it needs labeled=(logits, labels) of the step")
        if self.training:
            means = [labeled[0].detach().float().softmax(dim=1).mean(dim=0), probabilities.detach().mean(dim=0)]
            known, row = mean_across_ranks(torch.stack(means)).unbind()
            self.labeled_mean = torch.lerp(known, self.labeled_mean, self.momentum)
            if self.length is None:
                self.queue = torch.lerp(row[None], self.queue, self.momentum)
            else:
                self.queue, self.count = pushed(self.queue, row, self.count), self.count + 1
        return scaled(probabilities, self.labeled_mean / self.queue.mean(dim=0).clamp_min(SMALLEST))


def pushed(queue: Tensor, row: Tensor, count: Tensor) -> Tensor:
    """The queue (K, C) with the row (C,) in the place of its oldest one, where ``count`` rows went before."""
    place = torch.arange(len(queue), device=queue.device) == count % len(queue)
    return torch.where(place[:, None], row, queue)


def scaled(probabilities: Tensor, ratio: Tensor) -> Tensor:
    """Probabilities (B, C) times a ratio (C,), rows again summing to 1; a row of which nothing is left stays."""
    product = probabilities * ratio
    total = product.sum(dim=1, keepdim=True)
    return torch.where(total > 0, product / total, probabilities)
