import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.losses import (
    gradient_variances,
    irm_penalty,
    risk_variance,
    robust_weights,
    scale_gradients,
    variance_distance,
)

GENERATOR = torch.Generator().manual_seed(0)
H = torch.randn(15, 4, dtype=torch.float64, generator=GENERATOR)
Y = torch.randint(3, (15,), generator=GENERATOR)
DOMAIN = torch.tensor([0, 1, 1, 0, 2, 0, 1, 2, 0, 1, 0, 2, 1, 0, 1])
HEAD = nn.Linear(4, 3).double()
with torch.no_grad():
    HEAD.weight.copy_(torch.randn(3, 4, dtype=torch.float64, generator=GENERATOR))


def rows(s: int) -> list[int]:
    return [i for i, d in enumerate(DOMAIN.tolist()) if d == s]


def by_autograd(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gradient with respect to the dummy factor, as the paper's code takes it."""
    factor = torch.ones((), dtype=z.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(factor * z, y), factor, create_graph=True)
    return gradient


def test_factor_gradient_in_closed_form() -> None:
    z = H @ HEAD.weight.T.detach()
    wanted = torch.stack([by_autograd(z[i : i + 1], Y[i : i + 1]) for i in range(15)])
    assert torch.allclose(scale_gradients(z, Y), wanted, atol=1e-12)
    # two classes, logits (1, 0), label 1: p = σ(1), so <p - e, z> = σ(1)
    value = scale_gradients(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).item()
    assert value == pytest.approx(0.7310586, abs=1e-6)


@pytest.mark.parametrize("estimator", ["unbiased", "squared"])
def test_irm_penalty_and_its_gradient_are_those_of_two_derivatives(estimator) -> None:
    z, same = ((H @ HEAD.weight.T).detach().requires_grad_() for _ in range(2))
    values, counts = irm_penalty(z, Y, DOMAIN, 4, estimator)
    wanted = []
    for s in range(3):
        r = rows(s)
        if estimator == "squared":
            wanted.append(by_autograd(same[r], Y[r]).square())
        else:
            wanted.append(by_autograd(same[r[::2]], Y[r[::2]]) * by_autograd(same[r[1::2]], Y[r[1::2]]))
    assert torch.allclose(values[:3], torch.stack(wanted), atol=1e-12)
    assert values[3].item() == 0
    assert counts.tolist() == [6, 6, 3, 0]
    (values * torch.tensor([1.0, -2.0, 3.0, 1.0])).sum().backward()
    (torch.stack(wanted) * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    assert torch.allclose(z.grad, same.grad, atol=1e-12)


def test_product_of_halves_is_right_on_average_and_may_be_negative() -> None:
    z = torch.randn(4_000, 2, dtype=torch.float64, generator=GENERATOR)
    y = torch.randint(2, (4_000,), generator=GENERATOR)
    truth = scale_gradients(z, y).mean().square()
    domain = torch.arange(4_000) // 4  # 1,000 draws of four samples
    unbiased, squared = (irm_penalty(z, y, domain, 1_000, how)[0] for how in ("unbiased", "squared"))
    error = (unbiased.std() / 1_000**0.5).item()
    assert abs(unbiased.mean() - truth) < 3 * error
    assert squared.mean() - truth > 4 * error
    assert unbiased.min() < 0 <= squared.min()


def test_a_single_sample_has_no_second_half() -> None:
    z = torch.randn(1, 3, requires_grad=True)
    values, _ = irm_penalty(z, torch.tensor([1]), torch.tensor([0]), 2)
    values.sum().backward()
    assert torch.equal(values, torch.zeros(2))
    assert torch.isfinite(z.grad).all()


def test_variance_of_risks() -> None:
    risks = torch.tensor([1.0, 3.0, 50.0], requires_grad=True)
    value = risk_variance(risks, torch.tensor([2.0, 5.0, 0.0]))
    assert value.item() == 1.0  # ((1 - 2)² + (3 - 2)²) / 2, not / 1
    value.backward()
    assert risks.grad.tolist() == [-1.0, 1.0, 0.0]


def test_robust_weights() -> None:
    weights = robust_weights(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 0.0], requires_grad=True), 0.5)
    assert weights.tolist() == pytest.approx([torch.e / (1 + torch.e), 1 / (1 + torch.e)])
    assert not weights.requires_grad
    assert torch.allclose(robust_weights(weights, torch.tensor([7.0, 7.0]), 3.0), weights)
    assert torch.isfinite(robust_weights(weights, torch.tensor([1e4, 0.0]), 1.0)).all()


def test_variances_of_gradients_are_those_of_every_sample_alone() -> None:
    features, same = H.clone().requires_grad_(), H.clone().requires_grad_()
    found, counts = gradient_variances(features, HEAD(features), Y, DOMAIN, 4)
    assert counts.tolist() == [6, 6, 3, 0]
    assert not found[3].any()
    wanted = []
    for s in range(3):
        gradients = []
        for i in rows(s):
            loss = F.cross_entropy(HEAD(same[i : i + 1]), Y[i : i + 1])
            weight, bias = torch.autograd.grad(loss, [HEAD.weight, HEAD.bias], create_graph=True)
            gradients.append(torch.cat([weight, bias.unsqueeze(1)], dim=1))
        mean = sum(gradients) / len(gradients)
        wanted.append(sum((g - mean) ** 2 for g in gradients) / len(gradients))
    wanted = torch.stack(wanted)
    assert torch.allclose(found[:3], wanted, atol=1e-12)
    average = wanted.mean(0)
    distance = sum((v - average).square().mean() for v in wanted) / 3
    ours = variance_distance(found, counts)
    assert ours.item() == pytest.approx(distance.item(), rel=1e-10)
    leaves = [features, HEAD.weight, HEAD.bias]
    for a, b in zip(
        torch.autograd.grad(ours, leaves),
        torch.autograd.grad(distance, [same, HEAD.weight, HEAD.bias]),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)
        assert a.abs().sum() > 0


def test_equal_domains_have_no_distance() -> None:
    z = HEAD(H)
    found, counts = gradient_variances(
        torch.cat([H, H]), torch.cat([z, z]), torch.cat([Y, Y]), torch.arange(2).repeat_interleave(15), 2
    )
    assert variance_distance(found, counts).item() == pytest.approx(0, abs=1e-15)
