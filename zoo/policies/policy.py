"""What every policy is: from the logits of unlabeled samples to targets and weights."""

from typing import Any

from torch import Tensor, nn


class Policy(nn.Module):
    """Base of the policies: logits (B, C) → targets and weights (B,) in [0, 1], both without gradient.

    Targets are class indices (B,) where labels are hard, probabilities (B, C) where they are soft: torch's
    ``cross_entropy`` takes either. What moves from step to step are buffers, equal on all ranks, and moves in training
    mode only.

    A method hands over, by keyword, what else it knows of the step; a policy takes what it needs and lets
    ``**evidence`` swallow the rest:

    - ``index`` (B,): stable numbers of the samples;
    - ``labeled``: logits (B', C), without gradient, and labels (B',) of the step's labeled samples.
    """

    def forward(self, logits: Tensor, **evidence: Any) -> tuple[Tensor, Tensor]:
        """The most probable class of every sample, at full weight."""
        targets = logits.detach().argmax(dim=1)
        return targets, targets.new_ones(targets.shape, dtype=logits.dtype)

    def prepare(self, ids: Tensor) -> None:
        """Be told, once before training, the stable numbers (N,) of all unlabeled samples.

        A checkpoint may have been read before: what it restored must stay.
        """

    def thresholds(self) -> Tensor | None:
        """The confidence (C,) that each class has to reach now, to be looked at; ``None`` where there is none."""
        return None
