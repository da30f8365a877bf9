"""What label models must beat: counting votes, and counting them by accuracies that are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.core.label_models.base import LabeledVotes, LabelModel, measured_accuracies, symmetric_table
from zoo.core.label_models.sums import scores


class MajorityVote(LabelModel):
    r"""The class with the most votes; a tie is decided by the class balance.

    .. math:: P(y | v) \propto \pi_y\, 1[n_y = \max_c n_c], \quad n_c = \sum_j 1[v_j = c]

    Args:
        num_classes: C.
        balance: see :class:`~zoo.core.label_models.base.LabelModel`.
        soft: the shares of the votes :math:`n_y / \sum_c n_c` instead.
    """

    def __init__(self, num_classes: int, soft: bool = False, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.soft = soft

    @property
    def accuracies(self) -> Tensor:
        """Nothing is supposed of them: NaN (M,)."""
        return torch.full((self.num_functions,), float("nan"))

    def estimate(
        self, votes: Tensor, balance: Tensor, known: bool, labeled: LabeledVotes | None
    ) -> tuple[Tensor, Tensor]:
        """A table that counts."""
        one = torch.cat([torch.zeros(1, self.num_classes), torch.eye(self.num_classes)]).double()
        return one.repeat(votes.shape[1], 1, 1), balance

    def forward(self, votes: Tensor) -> Tensor:
        """Log-probabilities (N, C); those of impossible classes are finite."""
        self._check_ready(votes)
        with torch.autocast(votes.device.type, enabled=False):
            counts = scores(votes, self.table.float())
            balance = self.balance.float().expand_as(counts)
            if self.soft:
                total = counts.sum(dim=1, keepdim=True)
                chosen = torch.where(total > 0, counts, balance)
            else:
                chosen = torch.where(counts == counts.amax(dim=1, keepdim=True), balance, 0.0)
            return (chosen / chosen.sum(dim=1, keepdim=True)).clamp_min(torch.finfo(chosen.dtype).tiny).log()


class WeightedVote(LabelModel):
    r"""Votes weighted by the log-odds of known accuracies: optimal where functions err alike and independently.

    .. math:: P(y | v) \propto \pi_y \exp \sum_j 1[v_j = y] \log \frac{(C - 1)\, a_j}{1 - a_j}

    Args:
        num_classes: C.
        accuracies: a (M,) in (0, 1); if not given, measured on the labelled few, on each of which every function is
            taken to have cast one vote for every class besides.
        **kwargs: ``balance``, see :class:`~zoo.core.label_models.base.LabelModel`.

    Raises:
        UserError: for accuracies out of range, of another number of functions, or neither given nor measurable.

    Source: Nitzan and Paroush 1982, "Optimal decision rules in uncertain dichotomous choice situations", for C = 2.
    """

    def __init__(self, num_classes: int, accuracies: list[float] | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        if accuracies is not None and not all(0 < a < 1 for a in accuracies):
            raise UserError(f"WeightedVote: accuracies={accuracies} must lie in (0, 1)")
        self.given = accuracies

    @property
    def reads_labeled(self) -> bool:
        """Unless accuracies are given."""
        return self.given is None or super().reads_labeled

    def estimate(
        self, votes: Tensor, balance: Tensor, known: bool, labeled: LabeledVotes | None
    ) -> tuple[Tensor, Tensor]:
        """A table of log-odds."""
        if self.given is not None:
            if len(self.given) != len(self.speaks):
                raise UserError(f"WeightedVote: {len(self.given)} accuracies for {len(self.speaks)} functions")
            accuracies = torch.tensor(self.given, dtype=torch.float64)[self.speaks]
        elif labeled is not None:
            accuracies = measured_accuracies(labeled, self.num_classes)
        else:
            raise UserError("WeightedVote: accuracies are neither given nor measurable: there are no labelled samples")
        return symmetric_table(accuracies, self.num_classes), balance
