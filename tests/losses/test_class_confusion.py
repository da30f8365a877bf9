import math

import pytest
import torch
from torch import Tensor

from zoo.losses import certainty_weights, class_confusion, entropy, tsallis_confusion, tsallis_entropy


def logits(n: int = 6, k: int = 4, seed: int = 0) -> Tensor:
    return 3 * torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(z: Tensor, temperature: float) -> float:
    p = (z / temperature).softmax(1).tolist()
    n, k = z.shape
    w = [1 + math.exp(sum(v * math.log(v) for v in row)) for row in p]
    w = [n * value / sum(w) for value in w]
    c = [[sum(w[b] * p[b][i] * p[b][j] for b in range(n)) for j in range(k)] for i in range(k)]
    return sum(c[i][j] / sum(c[i]) for i in range(k) for j in range(k) if i != j) / k


def test_confusion_equals_the_matrix_by_loops() -> None:
    for temperature in (1.0, 2.5):
        assert class_confusion(logits(), temperature).item() == pytest.approx(by_loops(logits(), temperature))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_uniform_is_one_minus_one_over_k_and_certain_is_zero(k) -> None:
    assert class_confusion(torch.zeros(7, k)).item() == pytest.approx(1 - 1 / k)
    assert class_confusion(1e4 * torch.eye(k)).item() == 0
    assert class_confusion(1e4 * torch.eye(k + 2)[:k]).item() == 0  # two classes nobody is of


def test_confusion_does_not_depend_on_the_order_and_is_finite_at_the_ends() -> None:
    assert torch.allclose(class_confusion(logits().flip(0).flip(1)), class_confusion(logits()))
    z = (1e4 * torch.eye(3)).requires_grad_()
    class_confusion(z).backward()
    assert torch.isfinite(z.grad).all()
    half = logits().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(class_confusion(half), class_confusion(half.float()))


def test_weights_favour_certain_samples_and_carry_no_gradient() -> None:
    z = torch.tensor([[0.0, 0.0], [9.0, 0.0]], requires_grad=True)
    weights = certainty_weights(z)
    assert weights.mean().item() == pytest.approx(1)
    assert weights[1] > weights[0]
    assert not weights.requires_grad
    assert (weights[1] / weights[0]).item() == pytest.approx(2 / 1.5, abs=2e-3)  # (1 + e^0) / (1 + e^-log 2)


def test_tsallis_entropy_of_known_indices() -> None:
    p = logits().softmax(1)
    torch.testing.assert_close(tsallis_entropy(logits(), 2.0), 1 - p.square().sum(1))
    torch.testing.assert_close(tsallis_entropy(logits(), 1.0), entropy(logits()))
    torch.testing.assert_close(tsallis_entropy(logits(), 1 + 1e-6), entropy(logits()), atol=1e-4, rtol=0)
    uniform = tsallis_entropy(torch.zeros(1, 4, dtype=torch.float64), 1.9).item()
    assert uniform == pytest.approx((1 - 4 * 0.25**1.9) / 0.9)


def test_tsallis_confusion_contains_class_confusion_and_a_shannon_form() -> None:
    z = logits()
    torch.testing.assert_close(tsallis_confusion(z, 2.0, 2.5), 4 * class_confusion(z, 2.5))
    torch.testing.assert_close(tsallis_confusion(z, 1 + 1e-7), tsallis_confusion(z, 1.0), atol=1e-5, rtol=0)
    assert tsallis_confusion(1e4 * torch.eye(3)).item() == 0
    z = (1e4 * torch.eye(3)).requires_grad_()
    tsallis_confusion(z).backward()
    assert torch.isfinite(z.grad).all()
