from functools import partial

import pytest
import torch

from zoo.core.errors import UserError
from zoo.policies import DebiasedThreshold, MovingAlignment, Threshold


def logits_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_hand_example() -> None:
    targets, weights = Threshold(2, threshold=0.9)(logits_of([0.9, 0.1], [0.05, 0.95], [0.6, 0.4]))
    assert targets.tolist() == [0, 1, 0]
    assert weights.tolist() == [1.0, 1.0, 0.0]  # the threshold itself is reached


def test_soft_targets_and_temperature() -> None:
    targets, weights = Threshold(2, threshold=0.6, temperature=0.5, soft=True)(logits_of([2 / 3, 1 / 3]))
    torch.testing.assert_close(targets, torch.tensor([[0.8, 0.2]]))  # squares, normalised: 4/9 and 1/9
    assert weights.tolist() == [1.0]


def test_nothing_carries_a_gradient() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    targets, weights = Threshold(3, soft=True)(logits)
    assert not targets.requires_grad
    assert not weights.requires_grad


def test_permutation_of_classes() -> None:
    logits, order = torch.randn(50, 5), torch.randperm(5)
    targets, weights = Threshold(5, threshold=0.5)(logits)
    permuted_targets, permuted_weights = Threshold(5, threshold=0.5)(logits[:, order])
    assert torch.equal(order[permuted_targets], targets)
    assert torch.equal(permuted_weights, weights)


@pytest.mark.parametrize("arguments", [{"threshold": 0.0}, {"threshold": 1.1}, {"temperature": 0.0}])
def test_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        Threshold(3, **arguments)


def test_alignment_by_hand() -> None:
    alignment = MovingAlignment(2, momentum=0.5)
    aligned = alignment(torch.tensor([[0.8, 0.2], [0.4, 0.6]]))
    # the batch mean is (0.6, 0.4), the moving mean (0.55, 0.45)
    torch.testing.assert_close(alignment.mean, torch.tensor([0.55, 0.45]))
    expected = torch.tensor([[0.8 / 0.55, 0.2 / 0.45], [0.4 / 0.55, 0.6 / 0.45]])
    torch.testing.assert_close(aligned, expected / expected.sum(1, keepdim=True))


def test_alignment_with_a_matching_mean_changes_nothing_and_eval_does_not_move_it() -> None:
    alignment = MovingAlignment(3, prior=[1.0, 1.0, 2.0]).eval()
    p = torch.randn(7, 3).softmax(1)
    torch.testing.assert_close(alignment(p), p)
    assert alignment.mean.tolist() == [0.25, 0.25, 0.5]


def test_alignment_of_two_ranks_is_that_of_the_joint_batch(on_ranks) -> None:
    p = torch.randn(8, 3).softmax(1)

    def work(rank: int) -> torch.Tensor:
        alignment = MovingAlignment(3, momentum=0.3)
        alignment(p[rank::2])
        return alignment.mean

    joint = MovingAlignment(3, momentum=0.3)
    joint(p)
    for mean in on_ranks(work):
        torch.testing.assert_close(mean, joint.mean)


def test_bad_prior() -> None:
    with pytest.raises(UserError, match="must be 3 non-negative"):
        partial(MovingAlignment, prior=[0.5, 0.5])(3)


def test_thresholds_are_those_of_every_class() -> None:
    assert Threshold(3, threshold=0.5).thresholds().tolist() == [0.5] * 3
    assert DebiasedThreshold(2, threshold=0.75).thresholds().tolist() == [0.75] * 2
