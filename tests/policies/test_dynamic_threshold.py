import math

import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.policies import DynamicThreshold


def known(*probabilities: float) -> tuple[Tensor, Tensor]:
    """Labeled samples of class 0 with these probabilities."""
    return torch.tensor([[p, 1 - p] for p in probabilities]).log(), torch.zeros(len(probabilities), dtype=torch.long)


def binary(*confidences: float) -> Tensor:
    return torch.tensor([[p, 1 - p] for p in confidences]).log()


def test_schedule_by_hand() -> None:
    p = DynamicThreshold(2, warmup_steps=3, window=2, period=2, decay=2.0, scale=1.0, minimum=0.1)
    weak = binary(0.9, 0.55)
    for labeled in (0.01, 0.25, 0.5):  # the first step is before the window
        assert p(weak, labeled=known(labeled))[1].tolist() == [0.0, 0.0]
    start = (math.log(4) + math.log(2)) / 2  # 1.04
    falls = [start, start, start / 2, start / 2, start / 4, start / 4, start / 8, start / 8, 0.1, 0.1]
    for t, rho in enumerate(falls):
        assert p.bound().item() == pytest.approx(rho, rel=1e-5)
        torch.testing.assert_close(p.thresholds(), torch.full((2,), math.exp(-rho)))
        targets, weights = p(weak, labeled=known(0.99))
        # -log 0.9 = 0.105, -log 0.55 = 0.598
        assert weights.tolist() == [float(rho >= 0.1053605), float(rho >= 0.598)], t
        soft = torch.tensor([[0.81, 0.01], [0.3025, 0.2025]])
        soft = soft / soft.sum(1, keepdim=True)
        expected = torch.tensor([[1.0, 0.0], [1.0, 0.0]]) if rho == 0.1 else soft
        torch.testing.assert_close(targets, expected)


def test_scale_and_window_longer_than_the_warmup() -> None:
    p = DynamicThreshold(2, warmup_steps=2, window=100, scale=1.5)
    for labeled in (0.25, 0.5):
        p(binary(0.9), labeled=known(labeled))
    assert p.bound().item() == pytest.approx(1.5 * (math.log(4) + math.log(2)) / 2, rel=1e-5)


def test_evaluation_does_not_move_it() -> None:
    p = DynamicThreshold(2, warmup_steps=2).eval()
    p(binary(0.9), labeled=known(0.5))
    assert p.steps == 0
    assert p.labeled_loss == 0


def test_two_ranks_are_one_process_on_the_joint_batch(on_ranks) -> None:
    x, u = torch.randn(4, 3), torch.randn(8, 3)

    def run(rank: int, ranks: int) -> list[Tensor]:
        p = DynamicThreshold(3, warmup_steps=1)
        labels = torch.tensor([0, 1, 2, 0]).chunk(ranks)[rank]
        for _ in range(2):
            _, weights = p(u.chunk(ranks)[rank], labeled=(x.chunk(ranks)[rank], labels))
        return [weights, p.labeled_loss]

    joint, parts = run(0, 1), on_ranks(lambda rank: run(rank, 2))
    assert torch.equal(torch.cat([part[0] for part in parts]), joint[0])
    for part in parts:
        torch.testing.assert_close(part[1], joint[1])


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_number_of_classes_state_and_gradients(num_classes) -> None:
    p, fresh = DynamicThreshold(num_classes, warmup_steps=1), DynamicThreshold(num_classes, warmup_steps=1)
    labeled = torch.randn(3, num_classes, requires_grad=True), torch.zeros(3, dtype=torch.long)
    weak = torch.randn(4, num_classes, requires_grad=True)
    targets, weights = p(weak, labeled=labeled)
    assert not targets.requires_grad
    assert not weights.requires_grad
    assert not p.labeled_loss.requires_grad
    assert p.thresholds().shape == (num_classes,)
    fresh.load_state_dict(p.state_dict())
    assert torch.equal(fresh(weak, labeled=labeled)[1], p(weak, labeled=labeled)[1])


@pytest.mark.parametrize(
    "arguments",
    [{"warmup_steps": 0}, {"window": 0}, {"period": 0}, {"decay": 1.0}, {"scale": 0.0}, {"minimum": -1.0},
     {"temperature": 0.0}],
)  # fmt: skip
def test_out_of_range(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        DynamicThreshold(3, **arguments)


def test_without_labels() -> None:
    with pytest.raises(UserError, match="labeled"):
        DynamicThreshold(3)(torch.zeros(2, 3))
