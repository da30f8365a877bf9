import json
import math

import pytest
import torch
from torch import Tensor

from zoo.losses import fairness_loss
from zoo.policies import SelfAdaptiveThreshold

UNIFORM = torch.full((2,), 0.5)


def test_by_hand() -> None:
    # kept: (0.8, 0.2), (0.6, 0.4), (0.1, 0.9); sums (1.5, 1.5), counts (2, 1): (0.75, 1.5) → (1/3, 2/3)
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]]).log()
    loss = fairness_loss(logits, torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.4, 0.6]), UNIFORM)
    assert loss.item() == pytest.approx(0.4 * math.log(1 / 3) + 0.6 * math.log(2 / 3), rel=1e-6)


def test_reference_figures(root) -> None:
    golden = json.loads((root / "tests/golden/freematch.json").read_text())
    policy = SelfAdaptiveThreshold(5, momentum=golden["inputs"]["momentum"])
    for t in range(3):
        _, weights = policy(torch.tensor(golden["inputs"]["weak"][t]))
        strong = torch.tensor(golden["inputs"]["strong"][t], requires_grad=True)
        loss = fairness_loss(strong, weights, policy.mean, policy.histogram)
        loss.backward()
        torch.testing.assert_close(loss.detach(), torch.tensor(golden["outputs"]["fairness"][t]))
        torch.testing.assert_close(strong.grad, torch.tensor(golden["outputs"]["gradient"][t]), rtol=1e-5, atol=1e-6)


def test_against_a_loop_in_double_precision() -> None:
    logits, weights = torch.randn(12, 4, dtype=torch.float64), (torch.rand(12) > 0.5).double()
    mean, histogram = torch.rand(4).double(), torch.rand(4).double()
    p, h = torch.zeros(4).double(), torch.zeros(4).double()
    for z, w in zip(logits, weights, strict=True):
        p += w * z.softmax(0)
        h[z.argmax()] += w
    a, b = mean / histogram, torch.tensor([x / y if y else 0.0 for x, y in zip(p, h, strict=True)]).double()
    a, b = a / a.sum(), b / b.sum()
    expected = sum(x * math.log(y + 1e-12) for x, y in zip(a, b, strict=True))
    torch.testing.assert_close(fairness_loss(logits, weights, mean, histogram), expected)


def test_nothing_kept_is_zero_with_a_finite_gradient() -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    loss = fairness_loss(logits, torch.zeros(5), torch.full((3,), 1 / 3), torch.full((3,), 1 / 3))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.tolist() == [[0.0] * 3] * 5


def test_half_precision_and_many_classes() -> None:
    logits = torch.randn(8, 1000).bfloat16().requires_grad_()
    loss = fairness_loss(logits, torch.ones(8), torch.full((1000,), 1e-3), torch.full((1000,), 1e-3))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(logits.grad).all()


def test_gradient_of_two_ranks_averages_to_that_of_the_joint_batch(on_ranks) -> None:
    logits, weights = torch.randn(8, 3), torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 1])

    def run(rows: slice) -> list[Tensor]:
        mine = logits[rows].clone().requires_grad_()
        loss = fairness_loss(mine, weights[rows], torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.3, 0.3, 0.4]))
        loss.backward()
        return [loss.detach(), mine.grad]

    joint, parts = run(slice(None)), on_ranks(lambda rank: run(slice(4 * rank, 4 * rank + 4)))
    for part in parts:
        torch.testing.assert_close(part[0], joint[0])
    torch.testing.assert_close(torch.cat([part[1] / 2 for part in parts]), joint[1])
