import math

import pytest
import torch

from zoo.losses import class_balance, entropy, information_maximization, marginal_entropy


def test_certain_and_balanced_is_minus_log_c_and_uniform_is_zero() -> None:
    assert information_maximization(100 * torch.eye(4)).item() == pytest.approx(-math.log(4))
    assert information_maximization(torch.zeros(5, 4)).item() == pytest.approx(0, abs=1e-6)
    assert information_maximization(100 * torch.eye(4)[:1]).item() == pytest.approx(0, abs=1e-6)  # one class alone


def test_is_minus_the_mutual_information() -> None:
    z = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = z.softmax(1)
    mutual = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert torch.allclose(information_maximization(z), -mutual)
    assert torch.allclose(information_maximization(z, diversity=0.0), entropy(z).mean())
    assert torch.allclose(information_maximization(z, epsilon=1e-9), -mutual, atol=1e-7)
    assert torch.autograd.gradcheck(information_maximization, (z.requires_grad_(),))


def test_missing_classes_are_finite() -> None:
    for epsilon in (0.0, 1e-5):
        z = (1e4 * torch.eye(4)[:2]).requires_grad_()
        loss = information_maximization(z, epsilon)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(z.grad).all()
    assert marginal_entropy(torch.eye(3)[:1]).item() == 0


def test_class_balance_by_hand_and_smallest_where_uniform() -> None:
    p = torch.tensor([[0.75, 0.25], [0.75, 0.25]], dtype=torch.float64)
    wanted = -(0.5 * math.log(0.75) + 0.5 * math.log(0.25)) * 2
    assert class_balance(p).item() == pytest.approx(wanted)
    uniform = torch.full((3, 5), 0.2, dtype=torch.float64, requires_grad=True)
    loss = class_balance(uniform)
    loss.backward()
    assert loss.item() == pytest.approx(-5 * (0.2 * math.log(0.2) + 0.8 * math.log(0.8)))
    assert torch.allclose(uniform.grad, torch.zeros_like(uniform))
    alone = torch.eye(3)[:1].requires_grad_()
    class_balance(alone).backward()
    assert torch.isfinite(alone.grad).all()
