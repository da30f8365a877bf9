import math

import pytest

from zoo.weak_to_strong.pgr import gap_recovered, mean_gap_recovered


def test_identities() -> None:
    assert gap_recovered(0.6, 0.6, 0.9).pgr == 0
    assert gap_recovered(0.6, 0.9, 0.9).pgr == 1
    assert gap_recovered(0.6, 0.7, 0.9).pgr == pytest.approx(1 / 3)
    assert gap_recovered(0.6, 0.5, 0.9).pgr == pytest.approx(-1 / 3)
    assert gap_recovered(0.6, 1.0, 0.9).pgr == pytest.approx(4 / 3)


def test_unit_and_origin_of_the_score_do_not_matter() -> None:
    assert gap_recovered(60 + 7, 70 + 7, 90 + 7).pgr == pytest.approx(gap_recovered(0.6, 0.7, 0.9).pgr)


@pytest.mark.parametrize(("weak", "ceiling", "min_gap"), [(0.9, 0.9, 0), (0.97, 0.896, 0), (0.8, 0.84, 0.05)])
def test_without_a_gap_it_is_undefined_and_says_so(weak, ceiling, min_gap) -> None:
    result = gap_recovered(weak, 0.65, ceiling, min_gap)
    assert math.isnan(result.pgr)
    assert not result.defined
    assert (result.weak, result.student, result.ceiling) == (weak, 0.65, ceiling)


def test_mean_is_the_ratio_of_means() -> None:
    runs = [gap_recovered(0.5, 0.6, 0.9), gap_recovered(0.7, 0.9, 0.9)]
    assert mean_gap_recovered(runs).pgr == pytest.approx((0.75 - 0.6) / (0.9 - 0.6))
    assert mean_gap_recovered(runs[:1]).pgr == runs[0].pgr


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"min_gap=-0\.1"):
        gap_recovered(0, 0, 0, -0.1)
    with pytest.raises(ValueError, match="no runs"):
        mean_gap_recovered([])
