import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.policies import DebiasedThreshold, Threshold


def test_labels_first_then_moves_over_three_steps() -> None:
    p, logits = DebiasedThreshold(3, threshold=0.5, strength=0.7, momentum=0.5), 2 * torch.randn(3, 8, 3)
    marginal = torch.full((3,), 1 / 3)
    for z in logits:
        targets, weights = p(z)
        debiased = (z - 0.7 * marginal.log()).softmax(1)
        assert torch.equal(targets, debiased.argmax(1))
        assert torch.equal(weights, (debiased.amax(1) >= 0.5).float())
        marginal = 0.5 * marginal + 0.5 * z.softmax(1).mean(0)
        torch.testing.assert_close(p.marginal, marginal)
        torch.testing.assert_close(p.margin, 0.7 * marginal.log())


def test_preferred_class_loses_a_close_race() -> None:
    p = DebiasedThreshold(2, strength=1.0)
    p.marginal = torch.tensor([0.9, 0.1])
    assert p.eval()(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))[0].tolist() == [1, 0]


def test_strength_zero_and_a_uniform_start_are_the_plain_threshold() -> None:
    logits = 3 * torch.randn(20, 4)
    expected = Threshold(4)(logits)
    for p in (DebiasedThreshold(4, strength=0.0), DebiasedThreshold(4, strength=2.0)):
        for ours, plain in zip(p(logits), expected, strict=True):
            assert torch.equal(ours, plain)


def test_two_ranks_are_one_process_on_the_joint_batch(on_ranks) -> None:
    steps = torch.randn(3, 8, 3)

    def run(rows: slice) -> Tensor:
        p = DebiasedThreshold(3, momentum=0.5)
        for logits in steps:
            p(logits[rows])
        return p.marginal

    for marginal in on_ranks(lambda rank: run(slice(rank, None, 2))):
        torch.testing.assert_close(marginal, run(slice(None)))


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_number_of_classes_and_state(num_classes) -> None:
    p, fresh, logits = DebiasedThreshold(num_classes), DebiasedThreshold(num_classes), torch.zeros(2, num_classes)
    logits[:, 0] = 200.0  # the other classes' marginal falls, and its logarithm stays finite
    for _ in range(3):
        p(logits)
    assert torch.isfinite(p.margin).all()
    fresh.load_state_dict(p.state_dict())
    assert torch.equal(fresh.margin, p.margin)


@pytest.mark.parametrize("arguments", [{"threshold": 0.0}, {"strength": -1.0}, {"momentum": 1.0}])
def test_out_of_range(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        DebiasedThreshold(3, **arguments)
