import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from zoo.optim.pareto import pareto_weights, with_gradients


def program(products, guide, guided):
    """The linear program by scipy: (objective, lower bounds, best value)."""
    least, value = torch.zeros(len(guide)).double(), products.mean(1)
    if guided:
        agree, value = guide > 0, guide
        if agree.any():
            least = torch.where(agree, -torch.inf, guide)
            least[guide.argmax()] = 0
    keep = least > -torch.inf
    found = linprog(
        -value.numpy(), A_ub=-products[keep].numpy(), b_ub=-least[keep].numpy(), A_eq=np.ones((1, len(guide))), b_eq=[1]
    )
    assert found.success
    return value, least, -found.fun


@pytest.mark.parametrize("guided", [False, True])
def test_corners_solve_the_linear_program(guided) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 3, 3, 3, 4):
        for dimension in (1, 2, 3, 7):
            g = torch.randn(dimension, count, generator=generator).double()
            guide = g.T @ torch.randn(dimension, generator=generator).double()
            products = g.T @ g
            value, least, best = program(products, guide, guided)
            w = pareto_weights(products, guide, torch.tensor(guided))
            assert w.sum().item() == pytest.approx(1)
            assert (w >= 0).all()
            assert (products @ w >= least - 1e-6).all()
            assert (value @ w).item() == pytest.approx(best, abs=1e-6)


def test_no_loss_rises_without_a_guide() -> None:
    for seed in range(20):
        g = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        assert (g.T @ g @ pareto_weights(g.T @ g).float() >= -1e-5).all()


def test_closed_cases() -> None:
    assert torch.allclose(pareto_weights(torch.ones(3, 3)), torch.full((3,), 1 / 3).double())  # all alike
    g = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(g @ pareto_weights(g.T @ g).float(), torch.zeros(2))  # nothing can fall
    assert pareto_weights(torch.ones(1, 1)).tolist() == [1]
    assert torch.allclose(pareto_weights(torch.zeros(3, 3)), torch.full((3,), 1 / 3).double())
    g = torch.eye(3)
    assert torch.allclose(pareto_weights(g, torch.tensor([1.0, 0.5, 0.1])), torch.tensor([1.0, 0, 0]).double())


def test_order_and_scale_do_not_matter() -> None:
    g, v = torch.randn(4, 3).double(), torch.randn(4).double()
    order = torch.tensor([2, 0, 1])
    for guided in (False, True):
        w = pareto_weights(g.T @ g, g.T @ v, guided)
        turned = pareto_weights((g.T @ g)[order][:, order], (g.T @ v)[order], guided)
        assert torch.allclose(turned, w[order], atol=1e-9)
        assert torch.allclose(pareto_weights(1e-12 * g.T @ g, 1e-12 * g.T @ v, guided), w, atol=1e-9)


def test_the_guide_may_sacrifice_a_loss_but_not_the_one_that_serves_it_best() -> None:
    g = torch.tensor([[1.0, -0.2], [0.0, 1.0]]).double()
    v = torch.tensor([1.0, 0.0]).double()
    w = pareto_weights(g.T @ g, g.T @ v)
    assert w.tolist() == pytest.approx([1, 0])
    assert (g @ w @ g[:, 1]).item() < 0  # the second loss rises
    w = pareto_weights(g.T @ g, g.T @ v, guided=False)
    assert (g @ w @ g[:, 1]).item() >= -1e-9


def test_handed_gradients_arrive_and_scale() -> None:
    p, q = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    gradients = [torch.tensor([1.0, 2.0]), torch.full((3,), 5.0)]
    loss = with_gradients(torch.tensor(7.0), [p, q], [g.clone() for g in gradients])
    assert loss.item() == 7
    (0.5 * loss).backward()
    assert torch.equal(p.grad, 0.5 * gradients[0])
    assert torch.equal(q.grad, 0.5 * gradients[1])


def test_handing_gradients_over_passes_nothing_back_through_the_value() -> None:
    parameter, passed = torch.nn.Parameter(torch.ones(3)), []
    value = (2 * parameter).sum()
    value.register_hook(passed.append)
    value.grad_fn.register_prehook(passed.append)
    with_gradients(value, [parameter], [torch.full((3,), 5.0)]).backward()
    assert passed == []
    assert torch.equal(parameter.grad, torch.full((3,), 5.0))
