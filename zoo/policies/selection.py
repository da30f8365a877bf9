r"""Which pseudo-labels to believe: from predictions of the whole unlabeled set to targets and weights, round by round.

A :class:`~zoo.policies.policy.Policy` sees one batch of logits in a step; a selection sees all samples between two
trainings, and so may count, rank and compare classes exactly. The ``PseudoLabeler`` callback asks it once a round.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from zoo.core.errors import UserError


class Selection:
    r"""Base of the selections: probabilities (N, C) → targets (N, C) and weights (N,) in [0, 1]; all at full weight.

    A weight of 0 leaves a sample out of the round. Targets stay soft, :func:`harden` makes labels of them. Selections
    have no state: a round's result depends on what they are given and on nothing else, so it is equal on all ranks and
    after a resume.

    Args:
        num_classes: number of classes C.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(
        self, probabilities: Tensor, number: int = 1, rounds: int | None = None, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Targets and weights of a round.

        Args:
            probabilities: (N, C) of samples without labels, rows summing to 1.
            number: of the round, from 1 on.
            rounds: how many there will be, where that is known.
            prior: (C,) class frequencies among the labeled samples, where they are known.
        """
        return probabilities, self.weights(probabilities, number, rounds, prior)

    def weights(self, probabilities: Tensor, number: int, rounds: int | None, prior: Tensor | None) -> Tensor:
        """The weights (N,) alone: what most selections differ in."""
        return probabilities.new_ones(len(probabilities))


class ClassThresholds(Selection):
    r"""Base of selections by a confidence :math:`\theta_c` per class.

    .. math:: w = \mathbb 1[\max_c p_c \ge \theta_{\hat y}], \quad \hat y = \arg\max_c p_c
    """

    def thresholds(self, probabilities: Tensor, prior: Tensor | None = None) -> Tensor:
        """What a prediction of each class has to reach, (C,)."""
        raise NotImplementedError

    def weights(self, probabilities: Tensor, number: int, rounds: int | None, prior: Tensor | None) -> Tensor:
        """Those who reach their class's threshold."""
        confidence, label = probabilities.max(dim=1)
        return (confidence >= self.thresholds(probabilities, prior)[label]).to(probabilities.dtype)


class ConfidenceThreshold(ClassThresholds):
    r"""One fixed confidence :math:`\theta` for all classes.

    Args:
        num_classes: number of classes C.
        threshold: :math:`\theta` in [0, 1]; 0 selects everything.

    Source: Amini et al. 2022, arXiv 2202.12040; Lee 2013. FSLA of Feofanov et al. 2019 has 0.7.
    """

    def __init__(self, num_classes: int, threshold: float = 0.7) -> None:
        super().__init__(num_classes)
        if not 0.0 <= threshold <= 1.0:
            raise UserError(f"ConfidenceThreshold: threshold={threshold} must lie in [0, 1]")
        self.threshold = threshold

    def thresholds(self, probabilities: Tensor, prior: Tensor | None = None) -> Tensor:
        """The same for all classes."""
        return probabilities.new_full((self.num_classes,), self.threshold)


class MeanVote(ClassThresholds):
    r"""The mean confidence as threshold, :math:`\theta = \tfrac1N \sum_n \max_c p_{nc}`: about one half is selected.

    Source: the policy ``mean`` in the code of Feofanov et al. 2019, AAAI, "Transductive Bounds for the Multi-class
    Majority Vote Classifier".
    """

    def thresholds(self, probabilities: Tensor, prior: Tensor | None = None) -> Tensor:
        """The same for all classes."""
        return probabilities.amax(dim=1).mean().expand(self.num_classes)


class ClassAdaptive(ClassThresholds):
    r"""Lower thresholds for classes of which few predictions are sure: FlexMatch's rule on the whole set at once.

    .. math:: \theta_c = \tau\, \mathcal M(\beta_c), \quad \beta_c = \frac{\sigma_c}{\max(\max_k \sigma_k,\;
        N - \sum_k \sigma_k)}, \quad \sigma_c = \sum_n \mathbb 1[\max_k p_{nk} \ge \tau \wedge \hat y_n = c]

    with :math:`\mathcal M(\beta) = \beta / (2 - \beta)`. A class without a sure prediction has the threshold 0.

    Args:
        num_classes: number of classes C.
        threshold: :math:`\tau` in (0, 1].

    Source: Zhang et al. 2021, arXiv 2110.08263, with warm-up and convex mapping, counted over one prediction of all
    samples instead of the latest ones of training.
    """

    def __init__(self, num_classes: int, threshold: float = 0.95) -> None:
        super().__init__(num_classes)
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"ClassAdaptive: threshold={threshold} must lie in (0, 1]")
        self.threshold = threshold

    def thresholds(self, probabilities: Tensor, prior: Tensor | None = None) -> Tensor:
        """From the number of sure predictions of each class."""
        confidence, label = probabilities.max(dim=1)
        sure = torch.bincount(label[confidence >= self.threshold], minlength=self.num_classes)
        share = sure / torch.maximum(sure.max(), len(label) - sure.sum()).clamp_min(1)
        return (self.threshold * share / (2.0 - share)).to(probabilities.dtype)


class MostConfident(Selection):
    """The most confident samples, a fixed number or share of them.

    Args:
        num_classes: number of classes C.
        count: how many, at least 1.
        fraction: which share, in (0, 1]; exactly one of the two is given.

    Source: Amini et al. 2022, arXiv 2202.12040.
    """

    def __init__(self, num_classes: int, count: int | None = None, fraction: float | None = None) -> None:
        super().__init__(num_classes)
        _one_of(type(self).__name__, count, fraction)
        self.count, self.fraction = count, fraction

    def weights(self, probabilities: Tensor, number: int, rounds: int | None, prior: Tensor | None) -> Tensor:
        """1 for the first of the ranking."""
        return top(probabilities.amax(dim=1), _number(len(probabilities), self.count, self.fraction))


class Curriculum(Selection):
    r"""The :math:`r \Delta` most confident in round :math:`r`, until all are in.

    The paper trains every round from the initial weights and on labels made anew: ``restart: true`` and
    ``keep: false`` of the ``PseudoLabeler``. The code of Feofanov et al. begins with :math:`2 \Delta` in the first
    round; this one with :math:`\Delta`, as the paper.

    Args:
        num_classes: number of classes C.
        step: :math:`\Delta` in (0, 1]; None spreads the rounds evenly, so that the last one uses everything.

    Raises:
        UserError: when called with ``step=None`` and an unknown number of rounds.

    Source: Cascante-Bonilla et al. 2021, arXiv 2001.06001.
    """

    def __init__(self, num_classes: int, step: float | None = 0.2) -> None:
        super().__init__(num_classes)
        if step is not None and not 0.0 < step <= 1.0:
            raise UserError(f"Curriculum: step={step} must lie in (0, 1]")
        self.step = step

    def weights(self, probabilities: Tensor, number: int, rounds: int | None, prior: Tensor | None) -> Tensor:
        """1 for the first of the ranking."""
        if self.step is None and rounds is None:
            raise UserError("Curriculum: step=None needs a run of known length; give a step")
        share = number * (self.step if self.step is not None else 1.0 / max(rounds or 1, 1))
        return top(probabilities.amax(dim=1), _number(len(probabilities), None, min(share, 1.0)))


class Balanced(Selection):
    r"""As many samples of every class: the most confident of classes with many, copies where there are few.

    Among predictions above the threshold, each class keeps its :math:`k` most confident; a class with :math:`m < k` is
    filled up to :math:`k` with copies, :math:`\lfloor k / m \rfloor` of each sample and one more of
    :math:`k \bmod m` random ones. The weight is the number of copies over the largest one: a weighted mean of the loss
    is then the mean over the copies.

    Args:
        num_classes: number of classes C.
        count: :math:`k`, at least 1; None takes N / C.
        threshold: what confidence must exceed, in [0, 1).
        copies: whether classes with few samples are filled up.
        max_copies: most copies of one sample; None has no limit, as in the paper. Copies are weights here: without a
            limit a class that is hardly ever predicted takes all weight from the others, where a run is short.
        seed: of the draw of those with one copy more.

    Source: Xie et al. 2020, arXiv 1911.04252, "data filtering and balancing" (0.3, 130,000 of each ImageNet class).
    """

    def __init__(
        self,
        num_classes: int,
        count: int | None = None,
        threshold: float = 0.3,
        copies: bool = True,
        max_copies: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes)
        if count is not None and count < 1:
            raise UserError(f"Balanced: count={count} must be at least 1")
        if max_copies is not None and max_copies < 1:
            raise UserError(f"Balanced: max_copies={max_copies} must be at least 1, or null for no limit")
        if not 0.0 <= threshold < 1.0:
            raise UserError(f"Balanced: threshold={threshold} must lie in [0, 1)")
        self.count, self.threshold, self.copies, self.seed = count, threshold, copies, seed
        self.max_copies = max_copies

    def weights(self, probabilities: Tensor, number: int, rounds: int | None, prior: Tensor | None) -> Tensor:
        """Copies over the largest number of copies."""
        confidence, label = probabilities.max(dim=1)
        count = self.count or max(len(label) // self.num_classes, 1)
        usable = confidence > self.threshold
        copies = balanced_copies(confidence, label, usable, self.num_classes, count, self.copies, self.seed + number)
        if self.max_copies is not None:
            copies = copies.clamp_max(self.max_copies)
        return (copies / copies.max().clamp_min(1)).to(probabilities.dtype)


class Debiased(Selection):
    r"""Another selection on predictions from which their own bias towards classes is taken.

    .. math:: \tilde p_n = \mathrm{softmax}(\log p_n - \lambda \log \bar p), \quad \bar p = \tfrac1N \sum_n p_n

    Args:
        num_classes: number of classes C.
        strength: :math:`\lambda` ≥ 0; 0 changes nothing.
        select: the selection that sees :math:`\tilde p`, from the number of classes.

    Source: Wang et al. 2022, arXiv 2201.01490, with the mean over all samples instead of a moving one.
    """

    def __init__(
        self, num_classes: int, strength: float = 0.5, select: Callable[[int], Selection] = ConfidenceThreshold
    ) -> None:
        super().__init__(num_classes)
        if strength < 0.0:
            raise UserError(f"Debiased: strength={strength} must not be negative")
        self.strength, self.select = strength, select(num_classes)

    def __call__(
        self, probabilities: Tensor, number: int = 1, rounds: int | None = None, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Targets and weights of the other selection, on adjusted probabilities."""
        return self.select(adjust(probabilities, self.strength), number, rounds, prior)


class RandomSubset(Selection):
    """A random part, another one in every round: the control that any selection should beat.

    Args:
        num_classes: number of classes C.
        count: how many, at least 1.
        fraction: which share, in (0, 1]; exactly one of the two is given.
        seed: of the draw.
    """

    def __init__(
        self, num_classes: int, count: int | None = None, fraction: float | None = None, seed: int = 0
    ) -> None:
        super().__init__(num_classes)
        _one_of(type(self).__name__, count, fraction)
        self.count, self.fraction, self.seed = count, fraction, seed

    def weights(self, probabilities: Tensor, number: int, rounds: int | None, prior: Tensor | None) -> Tensor:
        """1 for the chosen."""
        order = torch.rand(len(probabilities), generator=_generator(self.seed, number))
        return top(order, _number(len(order), self.count, self.fraction)).to(probabilities)


def harden(targets: Tensor) -> Tensor:
    """The most probable class of each row as one-hot, (N, C) → (N, C)."""
    return one_hot(targets.argmax(dim=1), targets.shape[1]).to(targets.dtype)


def top(scores: Tensor, count: int) -> Tensor:
    """1 for the ``count`` highest of scores (N,), 0 for the others; of equal ones the first come first."""
    weights = torch.zeros_like(scores)
    weights[scores.argsort(descending=True, stable=True)[:count]] = 1.0
    return weights


def adjust(probabilities: Tensor, strength: float) -> Tensor:
    r""":math:`p \bar p^{-\lambda}` normalised, (N, C); :math:`\bar p` is the mean row, :math:`\lambda` the strength."""
    mean = probabilities.mean(dim=0).clamp_min(torch.finfo(probabilities.dtype).tiny)
    adjusted = probabilities * (mean / mean.max()).pow(-strength)
    return adjusted / adjusted.sum(dim=1, keepdim=True)


def balanced_copies(
    confidence: Tensor,
    label: Tensor,
    usable: Tensor,
    num_classes: int,
    count: int,
    copies: bool = True,
    seed: int = 0,
) -> Tensor:
    """How often each sample occurs in a set with ``count`` of every class.

    Args:
        confidence: (N,).
        label: (N,) predicted classes.
        usable: (N,) bool: who may be taken at all.
        num_classes: number of classes C.
        count: wanted of each class; a class without a usable sample has none.
        copies: fill up classes with fewer.
        seed: of the draw of those with one copy more.

    Returns:
        (N,) int64.
    """
    number = torch.zeros_like(label)
    generator = _generator(seed)
    for each in range(num_classes):
        own = (usable & (label == each)).nonzero().flatten()
        own = own[confidence[own].argsort(descending=True, stable=True)[:count]]
        if not len(own):
            continue
        times, rest = divmod(count, len(own)) if copies else (1, 0)
        number[own] = times
        number[own[torch.randperm(len(own), generator=generator)[:rest].to(own.device)]] += 1
    return number


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % (2**63)
    return torch.Generator().manual_seed(seed)


def _one_of(name: str, count: int | None, fraction: float | None) -> None:
    if (count is None) == (fraction is None):
        raise UserError(f"{name}: exactly one of count={count} and fraction={fraction} must be given")
    if count is not None and count < 1:
        raise UserError(f"{name}: count={count} must be at least 1")
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise UserError(f"{name}: fraction={fraction} must lie in (0, 1]")


def _number(total: int, count: int | None, fraction: float | None) -> int:
    # 0.6 of 5 is 3, although 0.6 * 5 and 3 * 0.2 * 5 need not be exactly that
    return min(count if count is not None else int((fraction or 0.0) * total + 1e-6), total)
