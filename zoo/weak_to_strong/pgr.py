"""Performance gap recovered: how far a student gets from its weak supervisor to what it could do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GapRecovered:
    """PGR with the numbers it is made of; read it together with them.

    Attributes:
        pgr: the recovered share of the gap; NaN where it is not defined.
        defined: whether the ceiling clears the weak supervisor.
        weak: score of the weak supervisor.
        student: score of the strong student trained on weak labels.
        ceiling: score of the strong student trained on true labels.
    """

    pgr: float
    defined: bool
    weak: float
    student: float
    ceiling: float


def gap_recovered(weak: float, student: float, ceiling: float, min_gap: float = 0.0) -> GapRecovered:
    r"""The share of the gap between weak and ceiling that the student recovers.

    .. math:: \mathrm{PGR} = \frac{s - w}{c - w}

    0 is the weak supervisor, 1 the ceiling; below 0 and above 1 are possible. Without a gap it says nothing (permuted
    labels then reach +4 in experiments), so it is NaN where :math:`c - w \le` ``min_gap``.

    Args:
        weak: w, a score of which more is better.
        student: s.
        ceiling: c.
        min_gap: what the gap must exceed, for example twice its standard error.

    Raises:
        ValueError: if ``min_gap`` is negative.

    Source: Burns et al. 2023, arXiv 2312.09390, section 3.
    """
    if min_gap < 0:
        raise ValueError(f"gap_recovered: min_gap={min_gap} must not be negative")
    gap = ceiling - weak
    defined = gap > min_gap
    return GapRecovered((student - weak) / gap if defined else math.nan, defined, weak, student, ceiling)


def mean_gap_recovered(runs: Sequence[GapRecovered], min_gap: float = 0.0) -> GapRecovered:
    """PGR of the mean scores over seeds: steadier than the mean of ratios, whose denominators may be small.

    Raises:
        ValueError: if there are no runs.
    """
    if not runs:
        raise ValueError("mean_gap_recovered: no runs")
    weak, student, ceiling = (
        sum(getattr(run, name) for run in runs) / len(runs) for name in ("weak", "student", "ceiling")
    )
    return gap_recovered(weak, student, ceiling, min_gap)
