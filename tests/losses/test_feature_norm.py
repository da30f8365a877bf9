import pytest
import torch

from zoo.losses import feature_norms, hard_feature_norm, stepwise_feature_norm


def test_stepwise_value_is_constant_and_its_gradient_lengthens() -> None:
    f = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True)
    loss = stepwise_feature_norm(f, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    unit = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    assert torch.allclose(f.grad, -2 * 0.5 * unit / 2)


def test_hard_by_hand() -> None:
    """Lengths 5 and 2: mean 3.5, which is 21.5 from 25."""
    f = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True)
    loss = hard_feature_norm(feature_norms(f))
    assert loss.item() == pytest.approx(21.5**2)
    loss.backward()
    assert torch.allclose(f.grad[1], torch.tensor([0.0, -2 * 21.5 / 2]))


def test_features_without_length_are_finite() -> None:
    f = torch.zeros(2, 3, requires_grad=True)
    (stepwise_feature_norm(f) + hard_feature_norm(feature_norms(f))).backward()
    assert torch.isfinite(f.grad).all()
