import json
import math

import pytest
import torch
from torch import Tensor

from zoo.losses import annealed_cross_entropy, annealing_threshold, mean_of_kept


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("linear", (0.1, 0.55, 1.0)),
        ("log", (0.1, 0.1 + 0.9 * (1 - math.exp(-2.5)), 0.1 + 0.9 * (1 - math.exp(-5)))),
        ("exp", (0.1 + 0.9 * math.exp(-5), 0.1 + 0.9 * math.exp(-2.5), 1.0)),
    ],
)
def test_schedules_at_the_start_middle_and_end(schedule, values) -> None:
    assert [annealing_threshold(t, 10, schedule) for t in (0.0, 0.5, 1.0)] == pytest.approx(values)


def test_schedules_against_reference_figures(root) -> None:
    expected = json.loads((root / "tests/golden/uda.json").read_text())["outputs"]["thresholds"]
    for schedule, values in zip(("linear", "log", "exp"), expected, strict=True):
        assert [annealing_threshold(t, 4, schedule) for t in (0.0, 0.5, 1.0)] == pytest.approx(values)


def test_samples_too_sure_of_their_label_are_left_out_and_not_counted() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]).log().requires_grad_()
    # the third is sure, of another class than its label: it stays
    loss = annealed_cross_entropy(logits, torch.tensor([0, 0, 0]), threshold=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(-(math.log(0.4) + math.log(0.3)) / 2)
    assert not logits.grad[0].any()
    assert logits.grad[1].any()


def test_threshold_one_is_cross_entropy_and_none_kept_is_zero() -> None:
    logits, labels = torch.randn(6, 3), torch.randint(3, (6,))
    torch.testing.assert_close(
        annealed_cross_entropy(logits, labels, 1.0, label_smoothing=0.1),
        torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1),
    )
    assert annealed_cross_entropy(logits, labels, 0.0).item() == 0.0


def test_weighted_mean_by_hand() -> None:
    losses = torch.tensor([2.0, 4.0, 9.0])
    assert mean_of_kept(losses, torch.tensor([1.0, 1.0, 0.0])).item() == 3.0
    assert mean_of_kept(losses, torch.zeros(3)).item() == 0.0


def test_losses_of_two_ranks_average_to_that_of_the_joint_batch(on_ranks) -> None:
    losses, weights = torch.rand(6), torch.tensor([1.0, 1, 1, 0, 0, 1])

    def run(rows: slice) -> Tensor:
        return mean_of_kept(losses[rows], weights[rows])

    parts = on_ranks(lambda rank: run(slice(3 * rank, 3 * rank + 3)))
    torch.testing.assert_close(sum(parts) / 2, run(slice(None)))
    empty = on_ranks(lambda rank: mean_of_kept(losses[:3], torch.zeros(3)))
    assert [x.item() for x in empty] == [0.0, 0.0]
