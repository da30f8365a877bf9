"""What label models share: what goes in, what comes out, what a checkpoint holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zoo.core.errors import UserError
from zoo.core.label_models.sums import scores
from zoo.core.votes import check_votes, correct_votes, coverage, function_name, vote_counts

Balance = Literal["uniform", "estimated", "labeled"] | list[float]
LabeledVotes = tuple[Tensor, Tensor]  # votes (n, M) and labels (n,) of the labelled few


class LabelModel(nn.Module):
    r"""From the votes of labelling functions to probabilities of the classes.

    .. math:: P(y | v) \propto \pi_y \exp \sum_j T_{j, v_j, y}

    A subclass says how the table T and the class balance π come from votes that nobody has labelled. Both are buffers,
    so that a checkpoint is plain; a table of another number of functions is taken from it as it is. A sample on which
    nobody votes gets the balance. Fitting is done on the CPU, wherever the votes are.

    Args:
        num_classes: C, at least 2.
        balance: π. ``"uniform"``; ``"estimated"`` from the votes, by the model itself or, where it cannot, by the
            shares of the majority vote; ``"labeled"`` from the labelled few, one more of each class being counted; or
            C positive numbers.

    Raises:
        UserError: for another balance.
    """

    min_functions: ClassVar[int] = 1
    sized_by_data: ClassVar[tuple[str, ...]] = ("table",)
    table: Tensor
    balance: Tensor

    def __init__(self, num_classes: int, balance: Balance = "uniform") -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"{self._owner}: num_classes={num_classes} must be at least 2")
        self.num_classes = num_classes
        if isinstance(balance, str):
            if balance not in ("uniform", "estimated", "labeled"):
                raise UserError(
                    f"{self._owner}: balance={balance!r} must be 'uniform', 'estimated', 'labeled' or {num_classes} "
                    "positive numbers"
                )
            self.balance_from, given = str(balance), torch.full((num_classes,), 1.0 / num_classes)
        else:
            self.balance_from, given = "given", self._checked(torch.as_tensor(list(balance), dtype=torch.float64))
        self.speaks = torch.zeros(0, dtype=torch.bool)  # which of the functions ``estimate`` sees
        self.register_buffer("table", torch.zeros(0, num_classes + 1, num_classes))
        self.register_buffer("balance", given.float())

    @property
    def _owner(self) -> str:
        return type(self).__name__

    @property
    def fitted(self) -> bool:
        """Whether there is something to predict with."""
        return len(self.table) > 0

    @property
    def num_functions(self) -> int:
        """M; 0 before fitting."""
        return len(self.table)

    @property
    def reads_labeled(self) -> bool:
        """Whether fitting asks for the labelled few."""
        return self.balance_from == "labeled"

    @property
    def accuracies(self) -> Tensor:
        """How often each function is right when it votes, (M,), as the model has it."""
        joint = self.table[:, 1:].double().exp() * self.balance.double()
        return (joint.diagonal(dim1=1, dim2=2).sum(1) / joint.sum(dim=(1, 2))).float()

    # Fitting ----------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(
        self,
        votes: Tensor,
        balance: Tensor | Sequence[float] | None = None,
        labeled: LabeledVotes | None = None,
        names: Sequence[str] | None = None,
    ) -> Self:
        """Learn from votes how far to trust each function.

        A function that never votes has no influence; a warning names it.

        Args:
            votes: (N, M) integers, -1 where a function abstains.
            balance: π (C,), in place of the constructor's.
            labeled: votes (n, M) and labels (n,) of samples whose label is known, for what asks for them.
            names: of the functions, for messages.

        Raises:
            UserError: without votes, for a class that does not exist, for too few functions that vote, and where the
                labelled few are asked for and there are none.
        """
        votes = check_votes(votes, self.num_classes, self._owner, names).cpu()
        if not votes.numel():
            raise UserError(f"{self._owner}: votes {tuple(votes.shape)} are empty; there is nothing to learn from")
        if labeled is not None:
            labeled = self._check_labeled(*labeled, votes.shape[1], names)
        self.speaks = speaks = coverage(votes) > 0
        silent = [function_name(j, names) for j in (~speaks).nonzero().flatten().tolist()]
        if int(speaks.sum()) < self.min_functions:
            raise UserError(
                f"{self._owner}: {int(speaks.sum())} labelling functions vote, but it needs at least "
                f"{self.min_functions}{'; always abstaining: ' + ', '.join(silent[:5]) if silent else ''}"
            )
        if silent:
            rank_zero_warn(f"{self._owner}: always abstaining, and left out: {', '.join(silent)}")
            votes = votes[:, speaks].contiguous()
            labeled = None if labeled is None else (labeled[0][:, speaks], labeled[1])
        known = balance is not None or self.balance_from != "estimated"
        table, found = self.estimate(votes, self._known_balance(votes, balance, labeled), known, labeled)
        everyone = table.new_zeros(len(speaks), *table.shape[1:])
        everyone[speaks] = table
        self.table = everyone.float().to(self.balance.device)
        self.balance = found.float().to(self.balance.device)
        return self

    @abstractmethod
    def estimate(
        self, votes: Tensor, balance: Tensor, known: bool, labeled: LabeledVotes | None
    ) -> tuple[Tensor, Tensor]:
        """The table (M, C + 1, C) and the balance (C,), float64 on the CPU.

        Args:
            votes: (N, M) small integers, every function of which votes somewhere.
            balance: (C,) float64, what the constructor or the caller says of it, or the majority vote.
            known: whether it is not the majority vote that says so: a model may do better.
            labeled: votes and labels of the labelled few.
        """

    def _known_balance(self, votes: Tensor, given: Any, labeled: LabeledVotes | None) -> Tensor:
        if given is not None:
            return self._checked(torch.as_tensor(given, dtype=torch.float64).cpu())
        if self.balance_from == "labeled":
            if labeled is None:
                raise UserError(f"{self._owner}: balance='labeled', but there are no labelled samples")
            counts = torch.bincount(labeled[1], minlength=self.num_classes).double() + 1
            return counts / counts.sum()
        if self.balance_from == "estimated":
            shares = torch.zeros(self.num_classes, dtype=torch.float64)
            for rows in votes.split(1 << 20):
                counts = vote_counts(rows, self.num_classes)
                best = ((counts == counts.amax(dim=1, keepdim=True)) & (counts > 0)).double()
                shares += (best / best.sum(dim=1, keepdim=True).clamp_min(1)).sum(dim=0)
            shares += 1  # no class is impossible
            return shares / shares.sum()
        if self.balance_from == "uniform":  # also where an earlier fit has found another
            return torch.full((self.num_classes,), 1.0 / self.num_classes, dtype=torch.float64)
        return self.balance.double().cpu()

    def _checked(self, balance: Tensor) -> Tensor:
        if balance.shape != (self.num_classes,) or not bool((balance > 0).all()) or not bool(balance.isfinite().all()):
            raise UserError(f"{self._owner}: balance={balance.tolist()} must be {self.num_classes} positive numbers")
        return balance / balance.sum()

    def _check_labeled(self, votes: Tensor, labels: Tensor, count: int, names: Any) -> LabeledVotes | None:
        votes, labels = check_votes(votes, self.num_classes, self._owner, names).cpu(), labels.long().cpu()
        if votes.shape != (len(labels), count):
            raise UserError(
                f"{self._owner}: labeled has votes {tuple(votes.shape)} and labels {tuple(labels.shape)}; with {count} "
                "functions they must be (n, M) and (n,)"
            )
        known = labels >= 0
        if bool((labels >= self.num_classes).any()):
            raise UserError(f"{self._owner}: labeled has label {int(labels.max())}, of {self.num_classes} classes")
        return (votes[known], labels[known]) if bool(known.any()) else None

    # Labelling --------------------------------------------------------------------------------------------------------

    def forward(self, votes: Tensor) -> Tensor:
        """Log-probabilities (N, C) of the classes.

        Raises:
            UserError: before fitting, for another number of functions and, on the CPU, for votes out of range.
        """
        self._check_ready(votes)
        with torch.autocast(votes.device.type, enabled=False):
            return (scores(votes, self.table.float()) + self.balance.float().log()).log_softmax(dim=1)

    def posterior(self, votes: Tensor) -> Tensor:
        """Probabilities (N, C) of the classes."""
        return self(votes).exp()

    def _check_ready(self, votes: Tensor) -> None:
        if not self.fitted:
            raise UserError(f"{self._owner}: nothing is known of the labelling functions yet; fit it first")
        if votes.ndim != 2 or votes.shape[1] != self.num_functions:
            raise UserError(
                f"{self._owner}: votes {tuple(votes.shape)} are not those of the {self.num_functions} labelling "
                "functions that it was fitted on"
            )
        if votes.device.type == "cpu":  # elsewhere a look would wait for the device
            check_votes(votes, self.num_classes, self._owner)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take as many functions as the checkpoint has."""
        for name in self.sized_by_data:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape[1:] == own.shape[1:] and len(saved) != len(own):
                setattr(self, name, own.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def symmetric_table(accuracies: Tensor, num_classes: int) -> Tensor:
    r"""The table of functions that are wrong in every way alike: :math:`\log a_j` or :math:`\log \frac{1-a_j}{C-1}`.

    Args:
        accuracies: a (M,) in (0, 1).
        num_classes: C.

    Returns:
        (M, C + 1, C); abstaining says nothing.
    """
    right = accuracies.log().view(-1, 1, 1)
    wrong = ((1 - accuracies) / (num_classes - 1)).log().view(-1, 1, 1)
    table = torch.where(torch.eye(num_classes, dtype=torch.bool), right, wrong)
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


def measured_accuracies(labeled: LabeledVotes, num_classes: int) -> Tensor:
    """Shares of right votes (M,) on the labelled few, as if each function had also voted for every class of one."""
    right, total = correct_votes(*labeled)
    return (right.double() + 1) / (total.double() + num_classes)
