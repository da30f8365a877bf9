import json
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.policies import TransductiveBound
from zoo.policies.transductive import bound_thresholds

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "transductive_bound.json").read_text())


def votes(count: int, classes: int, separation: float = 2.0) -> torch.Tensor:
    truth = torch.randint(classes, (count,))
    return (torch.randn(count, classes) + separation * torch.eye(classes)[truth]).double().softmax(1)


def error(p: np.ndarray, k: int, theta: float, grid: int) -> float:
    """The bound on the conditional error, one sample at a time."""
    count, classes = p.shape
    predicted = p.argmax(1)
    total = 0.0
    for i in range(classes):
        if i == k:
            continue
        mass, best = sum(p[n, i] for n in range(count)), np.inf
        for step in range(1, grid + 1):
            gamma = theta + (1 - theta) * step / grid
            inside = kept = below_theta = below_gamma = 0.0
            for n in range(count):
                vote, weight = p[n, k], p[n, i] / mass
                inside += weight * (theta <= vote < gamma)
                kept += weight * vote * (predicted[n] == k)
                below_theta += weight * vote * (vote < theta)
                below_gamma += weight * vote * (vote < gamma)
            best = min(best, inside + max(kept + below_theta - below_gamma, 0.0) / gamma)
        total += mass / count * best
    return total / max(np.mean((p[:, k] >= theta) & (predicted == k)), 1e-15)


@pytest.mark.parametrize(("count", "classes", "grid"), [(12, 2, 6), (15, 3, 5), (9, 4, 7)])
def test_equals_a_loop_over_samples_and_both_grids(count, classes, grid) -> None:
    p = votes(count, classes)
    found = bound_thresholds(p, grid)
    for k in range(classes):
        low, high = float(p[:, k].min()), float(p[:, k].max())
        thetas = [low + (high - low) * step / grid for step in range(grid)]
        errors = [error(p.numpy(), k, theta, grid) for theta in thetas]
        first = next(step for step in range(grid) if errors[step] <= min(errors) * (1 + 1e-9))
        assert float(found[k]) == pytest.approx(thetas[first], abs=1e-12)


@pytest.mark.parametrize("case", range(len(GOLDEN["inputs"]["votes"])))
def test_thresholds_of_the_released_code(case) -> None:
    given = torch.tensor(GOLDEN["inputs"]["votes"][case], dtype=torch.float64)
    expected = torch.tensor(GOLDEN["outputs"]["thresholds"][case], dtype=torch.float64)
    torch.testing.assert_close(bound_thresholds(given, early_stop=True), expected, rtol=0, atol=1e-9)


def test_certain_and_right_votes_select_everything() -> None:
    p = torch.eye(3).repeat(4, 1)
    targets, weights = TransductiveBound(3)(p)
    assert weights.all()
    assert torch.equal(targets, p)


def test_a_class_without_votes_is_never_selected_and_breaks_nothing() -> None:
    p = torch.cat([votes(50, 2), torch.zeros(50, 1)], dim=1)
    found = bound_thresholds(p)
    assert found[2] == 1.0
    torch.testing.assert_close(found[:2], bound_thresholds(p[:, :2]))


def test_separated_votes_leave_the_doubtful_ones_out() -> None:
    sure, doubtful = torch.tensor([[0.98, 0.02], [0.02, 0.98]]).repeat(40, 1), torch.full((20, 2), 0.5)
    doubtful[:, 0] += 0.01
    doubtful[:, 1] -= 0.01
    _, weights = TransductiveBound(2)(torch.cat([sure, doubtful]))
    assert weights[:80].all()
    assert not weights[80:].any()


def test_thresholds_differ_between_classes_and_lie_in_the_range_of_their_votes() -> None:
    p = votes(400, 3)
    found = bound_thresholds(p)
    assert (found >= p.amin(0)).all()
    assert (found < p.amax(0)).all()
    assert len(found.unique()) == 3
