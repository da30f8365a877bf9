import json

import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.policies import SelfAdaptiveThreshold


def test_by_hand_and_the_averages_move_before_they_are_used() -> None:
    p = SelfAdaptiveThreshold(2, momentum=0.5)
    targets, weights = p(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]).log())
    # mean confidence 0.75, so τ = (0.5 + 0.75)/2; mean prediction (0.7, 0.3), so p̃ = (0.6, 0.4); shares (3/4, 1/4)
    torch.testing.assert_close(p.global_threshold, torch.tensor(0.625))
    torch.testing.assert_close(p.mean, torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(p.histogram, torch.tensor([0.625, 0.375]))
    torch.testing.assert_close(p.thresholds(), torch.tensor([0.625, 0.625 * 2 / 3]))
    assert targets.tolist() == [0, 0, 0, 1]
    assert weights.tolist() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_equal_classes_have_the_global_threshold(num_classes) -> None:
    p = SelfAdaptiveThreshold(num_classes, momentum=0.9)
    p(10.0 * torch.eye(num_classes))
    torch.testing.assert_close(p.thresholds(), p.global_threshold.expand(num_classes))
    assert p.global_threshold > 1.05 / num_classes


def test_upper_bound() -> None:
    p = SelfAdaptiveThreshold(2, momentum=0.0, maximum=0.8)
    p(torch.tensor([[9.0, 0.0]]))
    assert p.global_threshold.item() == pytest.approx(0.8)


def test_reference_figures(root) -> None:
    golden = json.loads((root / "tests/golden/freematch.json").read_text())
    p = SelfAdaptiveThreshold(5, momentum=golden["inputs"]["momentum"])
    for t, logits in enumerate(golden["inputs"]["weak"]):
        assert p(torch.tensor(logits))[1].tolist() == golden["outputs"]["masks"][t]
        for name in ("global_threshold", "mean", "histogram"):
            torch.testing.assert_close(getattr(p, name), torch.tensor(golden["outputs"][name][t]))


def test_two_ranks_are_one_process_on_the_joint_batch(on_ranks) -> None:
    steps = 2 * torch.randn(3, 8, 4)

    def run(rows: slice) -> list[Tensor]:
        p = SelfAdaptiveThreshold(4, momentum=0.5)
        weights = [p(logits[rows])[1] for logits in steps]
        return [torch.stack(weights), p.global_threshold, p.mean, p.histogram]

    joint = run(slice(None))
    parts = on_ranks(lambda rank: run(slice(4 * rank, 4 * rank + 4)))
    for part in parts:
        torch.testing.assert_close(part[1:], joint[1:])
    assert torch.equal(torch.cat([part[0] for part in parts], dim=1), joint[0])


def test_evaluation_does_not_move_it_and_nothing_carries_a_gradient() -> None:
    p = SelfAdaptiveThreshold(3)
    p(torch.randn(4, 3))
    before = {k: v.clone() for k, v in p.state_dict().items()}
    targets, weights = p.eval()(torch.randn(4, 3, requires_grad=True))
    assert all(torch.equal(v, p.state_dict()[k]) for k, v in before.items())
    assert not targets.requires_grad
    assert not weights.requires_grad
    fresh = SelfAdaptiveThreshold(3)
    fresh.load_state_dict(before)
    assert torch.equal(fresh.thresholds(), p.thresholds())


@pytest.mark.parametrize("arguments", [{"momentum": 1.0}, {"momentum": -0.1}, {"maximum": 0.0}, {"maximum": 1.5}])
def test_out_of_range(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        SelfAdaptiveThreshold(3, **arguments)
