import pytest
import torch

from zoo.core.gradient_reversal import reverse_gradient


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 2.0])
def test_identity_forward_and_minus_strength_backward(strength) -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    out = reverse_gradient(x, strength)
    assert torch.equal(out, x)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    assert torch.equal(gradient, -strength * weight)


def test_compiles_away_nothing_downstream() -> None:
    x = torch.randn(5, requires_grad=True)
    (reverse_gradient(reverse_gradient(x, 2.0), 3.0)).sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 6.0))
