import math

import pytest
import torch
import torch.nn.functional as F

from zoo.losses import domain_accuracy, domain_loss


def test_undecided_costs_log_2() -> None:
    assert domain_loss(torch.zeros(3), torch.zeros(5)).item() == pytest.approx(math.log(2))


def test_source_is_one_and_each_domain_counts_half() -> None:
    source, target = torch.randn(2).double(), torch.randn(6).double()
    by_hand = -0.5 * torch.sigmoid(source).log().mean() - 0.5 * (1 - torch.sigmoid(target)).log().mean()
    assert domain_loss(source, target).item() == pytest.approx(float(by_hand), rel=1e-12)
    halves = F.binary_cross_entropy_with_logits(source, torch.ones(2).double())
    halves = 0.5 * (halves + F.binary_cross_entropy_with_logits(target, torch.zeros(6).double()))
    assert domain_loss(source.unsqueeze(1), target.unsqueeze(1)).item() == pytest.approx(float(halves), rel=1e-12)


def test_right_is_cheap_and_wrong_is_dear() -> None:
    sure = torch.tensor([20.0])
    assert domain_loss(sure, -sure).item() < 1e-6
    assert domain_loss(-sure, sure).item() == pytest.approx(20)


def test_extreme_logits_and_half_precision_stay_finite() -> None:
    source = torch.tensor([-3e4], dtype=torch.bfloat16, requires_grad=True)
    loss = domain_loss(source, torch.tensor([3e4], dtype=torch.bfloat16))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(source.grad).all()


def test_empty_side_counts_nothing() -> None:
    source = torch.zeros(0, requires_grad=True)
    loss = domain_loss(source, torch.zeros(4))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) / 2)


def test_accuracy() -> None:
    assert domain_accuracy(torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -1.0, -1.0])).item() == 0.75
