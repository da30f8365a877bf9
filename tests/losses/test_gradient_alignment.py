import pytest
import torch

from zoo.losses import gradient_alignment
from zoo.losses.gradient_alignment import alignment_of_losses, gradient_only


def test_alignment_is_blind_to_size_and_offset() -> None:
    g = torch.randn(50, dtype=torch.float64, requires_grad=True)
    assert gradient_alignment(g, 3 * g.detach()).item() == pytest.approx(0, abs=1e-20)
    assert gradient_alignment(g, 3 * g.detach() + 5).item() == pytest.approx(0, abs=1e-20)
    assert gradient_alignment(g, -g).item() == pytest.approx(4 * 49 / 50)
    h = torch.randn(50, dtype=torch.float64, requires_grad=True)
    own, other = torch.autograd.grad(gradient_alignment(g, h), (g, h), allow_unused=True)
    assert other is None
    difference = (g - g.mean()) / g.std() - (h - h.mean()) / h.std()
    assert torch.allclose(own, 2 * difference / 50 / g.std()), "mean and std are constants"


def test_alignment_of_losses_steers_what_weighs_the_first() -> None:
    theta = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, requires_grad=True)]
    w, x = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(6, 3, dtype=torch.float64)
    loss, main = ((x @ theta[0]) * w).square().mean(), (x @ theta[0]).pow(3).mean()
    g = torch.autograd.grad(loss, theta[0], create_graph=True)[0].flatten()
    h = torch.autograd.grad(main, theta[0], retain_graph=True)[0].flatten()
    zeros = torch.zeros(5)
    expected = gradient_alignment(torch.cat([g, zeros]), torch.cat([h, zeros]))
    found = alignment_of_losses(loss, main, theta)
    assert torch.allclose(found, expected)
    (wanted,) = torch.autograd.grad(expected, w, retain_graph=True)
    silent = gradient_only(found, [w])
    assert silent.item() == 0
    silent.backward()
    assert torch.allclose(w.grad, wanted)
    assert wanted.abs().sum() > 0
    assert all(p.grad is None for p in theta)
