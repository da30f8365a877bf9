import math

import pytest
import torch

from zoo.losses import entropy, squared_error


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [500.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -math.inf, -math.inf]])
    assert entropy(logits[:2]).tolist() == pytest.approx([math.log(4), 0.0])
    assert entropy(logits[2:, :2]).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_entropy_has_no_gradient_where_it_is_extreme() -> None:
    logits = torch.tensor([[0.0, 0.0], [200.0, 0.0], [1.0, 0.0]], requires_grad=True)
    entropy(logits).sum().backward()
    assert torch.equal(logits.grad[:2], torch.zeros(2, 2))
    assert logits.grad[2, 0] < 0 < logits.grad[2, 1]  # descent raises the likelier class


def test_squared_error_by_hand_and_its_bound() -> None:
    loss = squared_error(torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
    assert loss.item() == pytest.approx((0.5 + 0 + 0.5) / 6)
    assert squared_error(torch.tensor([[900.0, 0.0, 0.0, 0.0]]), torch.eye(4)[1:2]).item() == pytest.approx(2 / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(dtype) -> None:
    logits = torch.randn(3, 5, dtype=dtype)
    expected = torch.float32 if dtype == torch.bfloat16 else dtype
    assert entropy(logits).dtype == expected
    assert squared_error(logits, torch.rand(3, 5)).dtype == expected
