import json
import math

import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.policies import Alignment, MovingAlignment, TruncatedGaussian


def binary(*confidences: float) -> Tensor:
    return torch.tensor([[p, 1.0 - p] for p in confidences]).log()


def test_weight_is_the_closed_form() -> None:
    p = TruncatedGaussian(2, momentum=0.0, alignment=None)
    _, weights = p(binary(0.9, 0.8, 0.7, 0.6))
    # mean 0.75; unbiased variance (0.0225 + 0.0025) · 2 / 3 = 0.05/3; n_σ² / 2σ² = 2 · 60 = 120
    expected = [1.0, 1.0, math.exp(-120 * 0.05**2), math.exp(-120 * 0.15**2)]
    torch.testing.assert_close(weights, torch.tensor(expected))
    torch.testing.assert_close(p.thresholds(), torch.tensor([0.75, 0.75]))


def test_start_and_limits() -> None:
    p = TruncatedGaussian(4).eval()
    assert p.mean.tolist() == [0.25]
    assert p.variance.tolist() == [1.0]
    assert p(torch.randn(9, 4))[1].tolist() == [1.0] * 9  # no confidence is below 1/C
    p.mean, p.variance = torch.tensor([0.9]), torch.tensor([1e6])
    torch.testing.assert_close(p(torch.randn(9, 4))[1], torch.ones(9))  # a wide Gaussian is no threshold at all
    p.variance = torch.tensor([0.0])  # a narrow one is a hard threshold at the mean
    assert p(torch.tensor([[9.0, 0, 0, 0], [1.0, 0, 0, 0]]))[1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_number_of_classes(num_classes) -> None:
    for per_class in (False, True):
        p = TruncatedGaussian(num_classes, per_class=per_class)
        targets, weights = p(torch.randn(6, num_classes))
        assert p.thresholds().shape == (num_classes,)
        assert targets.shape == weights.shape == (6,)
        assert ((weights > 0) & (weights <= 1)).all()


def test_one_sample_moves_nothing() -> None:
    p = TruncatedGaussian(2, alignment=None)
    p(binary(0.9))
    assert p.mean.tolist() == [0.5]
    assert p.variance.tolist() == [1.0]


def test_variance_of_nearly_equal_confidences() -> None:
    p = TruncatedGaussian(2, momentum=0.0, alignment=None)
    values = torch.tensor([0.9900, 0.9901, 0.9902, 0.9903])
    logits = torch.stack([values, 1 - values], dim=1).log()
    for _ in range(2):  # the second time the offsets are from the right mean
        p(logits)
    torch.testing.assert_close(p.variance[0], logits.softmax(1)[:, 0].double().var().float(), rtol=1e-3, atol=0)


def test_alignment_weights_but_does_not_label() -> None:
    class Swap(Alignment):
        def __init__(self, num_classes: int) -> None:
            super().__init__()

        def forward(self, probabilities: Tensor, **evidence) -> Tensor:
            return torch.where(torch.tensor([True, False]), 0.99, 0.01).expand_as(probabilities)

    logits = binary(0.2, 0.3, 0.4)
    plain = TruncatedGaussian(2, momentum=0.0, alignment=Swap)
    targets, weights = plain(logits)
    assert targets.tolist() == [1, 1, 1]
    assert weights.tolist() == [1.0] * 3
    torch.testing.assert_close(plain.mean, torch.tensor([0.7]))
    aligned = TruncatedGaussian(2, momentum=0.0, alignment=Swap, aligned=True)
    aligned(logits)
    torch.testing.assert_close(aligned.mean, torch.tensor([0.99]))


def test_per_class_by_hand() -> None:
    p = TruncatedGaussian(3, momentum=0.5, per_class=True, alignment=None)
    p(torch.tensor([[0.9, 0.05, 0.05], [0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]).log())
    third = 1 / 3
    torch.testing.assert_close(p.mean, torch.tensor([(third + 0.8) / 2, third, third]))  # one sample is too few
    torch.testing.assert_close(p.variance, torch.tensor([(1 + 0.02) / 2, 1.0, 1.0]))


@pytest.mark.parametrize("name", ["plain", "aligned"])
def test_reference_figures(root, name) -> None:
    golden = json.loads((root / "tests/golden/softmatch.json").read_text())
    momentum, expected = golden["inputs"]["momentum"], golden["outputs"][name]
    p = TruncatedGaussian(
        5, momentum=momentum, aligned=name == "aligned", alignment=lambda c: MovingAlignment(c, momentum=momentum)
    )
    for t, logits in enumerate(golden["inputs"]["logits"]):
        weights = p(torch.tensor(logits))[1]
        torch.testing.assert_close(weights, torch.tensor(expected["weights"][t]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p.mean[0], torch.tensor(expected["mean"][t]))
        torch.testing.assert_close(p.variance[0], torch.tensor(expected["variance"][t]))


@pytest.mark.parametrize("per_class", [False, True])
def test_two_ranks_are_one_process_on_the_joint_batch(on_ranks, per_class) -> None:
    steps = 2 * torch.randn(3, 8, 3)

    def run(rows: slice) -> list[Tensor]:
        p = TruncatedGaussian(3, momentum=0.5, per_class=per_class)
        weights = [p(logits[rows])[1] for logits in steps]
        return [torch.stack(weights), p.mean, p.variance]

    joint = run(slice(None))
    parts = on_ranks(lambda rank: run(slice(4 * rank, 4 * rank + 4)))
    for part in parts:
        torch.testing.assert_close(part[1:], joint[1:])
    torch.testing.assert_close(torch.cat([part[0] for part in parts], dim=1), joint[0])


def test_state_comes_back_and_evaluation_does_not_move_it() -> None:
    p = TruncatedGaussian(3, momentum=0.5)
    p(torch.randn(8, 3))
    fresh = TruncatedGaussian(3, momentum=0.5).eval()
    fresh.load_state_dict(p.state_dict())
    logits = torch.randn(8, 3, requires_grad=True)
    _, weights = fresh(logits)
    torch.testing.assert_close(weights, p.eval()(logits)[1])
    assert not weights.requires_grad
    assert torch.equal(fresh.mean, p.mean)


@pytest.mark.parametrize("arguments", [{"sigmas": 0.0}, {"momentum": 1.0}])
def test_out_of_range(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        TruncatedGaussian(3, **arguments)
