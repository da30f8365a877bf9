import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.losses import coral, covariance


def samples(n: int, d: int = 3, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def by_loops(x: Tensor) -> list[list[float]]:
    n, d = x.shape
    means = [sum(float(row[j]) for row in x) / n for j in range(d)]
    return [
        [sum((float(r[i]) - means[i]) * (float(r[j]) - means[j]) for r in x) / (n - 1) for j in range(d)]
        for i in range(d)
    ]


def test_covariance_is_numpys_and_that_of_loops() -> None:
    x = samples(6)
    np.testing.assert_allclose(covariance(x), np.cov(x.numpy(), rowvar=False), atol=1e-12)
    np.testing.assert_allclose(covariance(x), by_loops(x), atol=1e-12)


def test_both_forms_equal_explicit_loops() -> None:
    x, y = samples(6), samples(9, scale=2.0, seed=1) + 1
    a, b = by_loops(x), by_loops(y)
    squares = sum((a[i][j] - b[i][j]) ** 2 for i in range(3) for j in range(3))
    means = sum(float(x[:, i].mean() - y[:, i].mean()) ** 2 for i in range(3))
    assert coral(x, y).item() == pytest.approx(squares / (4 * 9), rel=1e-12)
    assert coral(x, y, form="moments").item() == pytest.approx(means / 3 + squares / 9, rel=1e-12)


def test_hand_numbers() -> None:
    """Variances 2 and 8 in one dimension: (8 - 2)² / 4 = 9; means 0 and 3: 3² + 36 = 45."""
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])
    assert coral(x, y).item() == 9
    assert coral(x, y, form="moments").item() == 45


def test_zero_for_equal_covariances_whatever_the_means_and_the_order() -> None:
    x = samples(6)
    assert coral(x, x.flip(0) + 10).item() == pytest.approx(0, abs=1e-20)
    assert coral(x, x + 10, form="moments").item() == pytest.approx(100)
    y = samples(5, seed=1)
    assert torch.allclose(coral(x.flip(0), y), coral(x, y))
    assert torch.allclose(coral(x, y), coral(y, x))


@pytest.mark.parametrize("form", ["covariance", "moments"])
def test_gradients_also_where_nothing_differs(form) -> None:
    x, y = samples(5).requires_grad_(), samples(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: coral(a, b, form), (x, y))
    same = samples(5).requires_grad_()
    coral(same, same.detach().clone(), form).backward()
    assert torch.equal(same.grad, torch.zeros_like(same))


def test_a_single_sample_is_finite_and_half_precision_is_widened() -> None:
    assert torch.isfinite(coral(samples(1), samples(4)))
    x, y = samples(6).bfloat16(), samples(6, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(coral(x, y), coral(x.float(), y.float()))


def test_refusal() -> None:
    with pytest.raises(UserError, match="moments"):
        coral(samples(3), samples(3), form="moment")  # type: ignore[arg-type]
