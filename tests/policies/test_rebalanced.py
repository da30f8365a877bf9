from functools import partial

import pytest
import torch

from zoo.core.errors import UserError
from zoo.policies import MovingAlignment, Policy, Rebalanced, TemperedAlignment, Threshold


def labels(*counts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labeled evidence with so many samples of each class."""
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.zeros(len(chosen), len(counts)), chosen


def every(num_classes: int) -> Policy:
    """The most probable class of every sample, at full weight."""
    return Policy()


def rebalanced(classes: int, *counts: int, **arguments) -> Rebalanced:
    policy = Rebalanced(classes, every, **arguments)
    policy.frequencies.counts = torch.tensor(counts).float()
    return policy


def test_rates_by_hand() -> None:
    policy = rebalanced(3, 16, 4, 1, power=0.5)
    targets, weights = policy(torch.eye(3))
    assert targets.tolist() == [0, 1, 2]
    # classes in order of frequency: (1/16)^.5, (4/16)^.5, (16/16)^.5
    assert weights.tolist() == pytest.approx([0.25, 0.5, 1.0])


def test_classes_in_any_order() -> None:
    _, weights = rebalanced(4, 2, 100, 30, 7, power=1.0)(torch.eye(4))
    assert weights.tolist() == pytest.approx([1.0, 0.02, 0.07, 0.3])


def test_even_classes_and_power_zero_change_nothing() -> None:
    assert rebalanced(3, 5, 5, 5)(torch.eye(3))[1].tolist() == [1.0] * 3
    assert rebalanced(3, 9, 5, 1, power=0.0)(torch.eye(3))[1].tolist() == [1.0] * 3


def test_soft_targets_and_refused_samples_stay() -> None:
    policy = Rebalanced(2, partial(Threshold, threshold=0.9, soft=True), power=1.0)
    policy.frequencies.counts = torch.tensor([4.0, 1.0])
    targets, weights = policy(torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.5, 0.5]]).log())
    assert targets.shape == (3, 2)
    assert weights.tolist() == [0.25, 1.0, 0.0]


def test_labels_of_the_step_count_before_they_are_used_and_only_in_training() -> None:
    policy = Rebalanced(2, every, power=1.0)
    policy.eval()
    assert policy(torch.eye(2), labeled=labels(5, 0))[1].tolist() == [1.0, 1.0]
    policy.train()
    assert policy(torch.eye(2), labeled=labels(7, 1))[1].tolist() == [0.25, 1.0]  # 8 and 2 with one of each
    assert policy(torch.eye(2), labeled=labels(8, 0))[1].tolist() == [0.125, 1.0]
    assert policy(torch.eye(2))[1].tolist() == [0.125, 1.0]
    other = Rebalanced(2, every, power=1.0)
    other.load_state_dict(policy.state_dict())
    assert other.frequencies.counts.tolist() == [16.0, 2.0]


def test_the_policy_within_is_told_and_asked() -> None:
    policy = Rebalanced(3, partial(Threshold, alignment=MovingAlignment))
    policy.train()
    policy(torch.randn(4, 3), labeled=labels(1, 1, 1))
    assert not torch.equal(policy.policy.alignment.mean, torch.full((3,), 1 / 3))
    assert policy.thresholds().tolist() == pytest.approx([0.95] * 3)


def test_alignment_by_hand() -> None:
    alignment = TemperedAlignment(2, temperature=0.5, momentum=0.0)
    alignment.frequencies.counts = torch.tensor([15.0, 4.0])
    aligned = alignment(torch.tensor([[0.7, 0.3], [0.5, 0.5]]), labeled=labels(1, 0))
    # frequencies 16 : 4, tempered 4 : 2; the predictions' mean is (.6, .4)
    scaled = torch.tensor([[0.7 * 4 / 0.6, 0.3 * 2 / 0.4], [0.5 * 4 / 0.6, 0.5 * 2 / 0.4]])
    torch.testing.assert_close(aligned, scaled / scaled.sum(1, keepdim=True))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, [0.8, 0.2]), (0.0, [0.5, 0.5])])
def test_alignment_limits(temperature, expected) -> None:
    alignment = TemperedAlignment(2, temperature=temperature)
    alignment.frequencies.counts = torch.tensor([16.0, 4.0])
    alignment(torch.rand(3, 2).softmax(1), labeled=labels(0, 0))
    assert alignment.prior.tolist() == pytest.approx(expected)


def test_alignment_becomes_even_step_by_step() -> None:
    alignment = TemperedAlignment(2, temperature=0.0, ramp_steps=2)
    alignment.frequencies.counts = torch.tensor([16.0, 1.0])
    priors = []
    for _ in range(4):
        alignment(torch.full((1, 2), 0.5), labeled=labels(0, 0))
        priors.append(alignment.prior[0].item())
    assert priors == pytest.approx([16 / 17, 4 / 5, 0.5, 0.5])
    before = alignment.state_dict()
    alignment.eval()(torch.rand(1, 2), labeled=labels(3, 3))
    assert all(torch.equal(value, before[name]) for name, value in alignment.state_dict().items())


def test_two_ranks_are_one_batch(on_ranks) -> None:
    logits = torch.randn(6, 3)
    z, y = labels(4, 1, 1)

    def work(rank: int) -> list[torch.Tensor]:
        policy = Rebalanced(3, partial(Threshold, threshold=0.3, alignment=TemperedAlignment))
        _, weights = policy(logits[rank::2], labeled=(z[rank::2], y[rank::2]))
        return [policy.frequencies.counts, policy.policy.alignment.prior, weights]

    joint = Rebalanced(3, partial(Threshold, threshold=0.3, alignment=TemperedAlignment))
    _, weights = joint(logits, labeled=(z, y))
    for rank, (counts, prior, part) in enumerate(on_ranks(work)):
        assert torch.equal(counts, joint.frequencies.counts)
        torch.testing.assert_close(prior, joint.policy.alignment.prior)
        torch.testing.assert_close(part, weights[rank::2])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Rebalanced(3, power=-1.0), "Rebalanced: power=-1"),
        (lambda: TemperedAlignment(3, temperature=1.5), "temperature=1.5"),
        (lambda: TemperedAlignment(3, ramp_steps=-1), "ramp_steps=-1"),
    ],
)
def test_out_of_range(build, message) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_tempered_alignment_needs_labels() -> None:
    with pytest.raises(UserError, match="it needs labeled"):
        TemperedAlignment(3).train()(torch.full((2, 3), 1 / 3))
