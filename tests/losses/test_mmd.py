import math
from itertools import product

import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.losses import Gaussian, joint_mmd, mmd

FIVE = (0.125, 0.25, 0.5, 1.0, 2.0)


def samples(n: int, d: int = 4, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def squared(a: Tensor, b: Tensor) -> float:
    return sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True))


def by_loops(xs: list[Tensor], ys: list[Tensor], variances: list[float | None], biased: bool) -> float:
    """The definition, one pair of samples after another."""
    scales = []
    for x, y, variance in zip(xs, ys, variances, strict=True):
        rows = [*x, *y]
        mean = sum(squared(a, b) for a in rows for b in rows) / len(rows) ** 2
        scales.append(mean if variance is None else variance)

    def kernel(left: list[Tensor], i: int, right: list[Tensor], j: int) -> float:
        value = 1.0
        for a, b, scale, variance in zip(left, right, scales, variances, strict=True):
            multipliers = FIVE if variance is None else (1.0,)
            value *= sum(math.exp(-squared(a[i], b[j]) / (2 * u * scale)) for u in multipliers)
        return value

    def within(side: list[Tensor]) -> float:
        n = len(side[0])
        pairs = [(i, j) for i, j in product(range(n), range(n)) if biased or i != j]
        return sum(kernel(side, i, side, j) for i, j in pairs) / len(pairs)

    n, m = len(xs[0]), len(ys[0])
    between = sum(kernel(xs, i, ys, j) for i, j in product(range(n), range(m))) / (n * m)
    return within(xs) + within(ys) - 2 * between


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 7)])
def test_equals_explicit_loops(n, m, biased) -> None:
    x, y = samples(n), samples(m, shift=0.5, seed=1)
    ours = mmd(x, y, estimator="biased" if biased else "unbiased")
    assert ours.item() == pytest.approx(by_loops([x], [y], [None], biased), abs=1e-12)
    fixed = mmd(x, y, multipliers=(1.0,), variance=0.7, estimator="biased" if biased else "unbiased")
    assert fixed.item() == pytest.approx(by_loops([x], [y], [0.7], biased), abs=1e-12)


@pytest.mark.parametrize("biased", [True, False])
def test_joint_equals_explicit_loops(biased) -> None:
    xs, ys = [samples(4), samples(4, 3, seed=2).softmax(1)], [samples(6, shift=1, seed=1), samples(6, 3, seed=3)]
    kernels = [Gaussian(), Gaussian((1.0,), 0.92**2)]
    ours = joint_mmd(xs, ys, kernels, "biased" if biased else "unbiased")
    assert ours.item() == pytest.approx(by_loops(xs, ys, [None, 0.92**2], biased), abs=1e-12)


@pytest.mark.parametrize("estimator", ["linear", "pairs"])
def test_linear_estimators_equal_explicit_loops(estimator) -> None:
    x, y = samples(6), samples(6, shift=0.5, seed=1)
    variance = sum(squared(a, b) for a in [*x, *y] for b in [*x, *y]) / 144

    def k(a: Tensor, b: Tensor) -> float:
        return sum(math.exp(-squared(a, b) / (2 * u * variance)) for u in FIVE)

    steps = [(i, (i + 1) % 6) for i in range(6)] if estimator == "linear" else [(0, 1), (2, 3), (4, 5)]
    terms = [k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in steps]
    assert mmd(x, y, estimator=estimator).item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)


def test_tllibs_constant_is_what_unbiased_leaves_out() -> None:
    """Hand numbers: samples 0 and 2 on either side, σ² = 2 (mean of 0, 4, 0, 4 ...), one kernel."""
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    close = math.exp(-4 / 4)
    unbiased = close + close - 2 * (0.5 + 0.5 * close)
    assert mmd(x, x.clone(), multipliers=(1.0,)).item() == pytest.approx(unbiased, abs=1e-12)
    assert unbiased < 0
    assert unbiased + 2 / (2 - 1) > 0  # TLlib's 2 / (n - 1)


def test_equal_sets() -> None:
    x = samples(6)
    assert mmd(x, x[torch.tensor([3, 1, 0, 5, 4, 2])], estimator="biased").item() == pytest.approx(0, abs=1e-12)
    assert mmd(x, x, estimator="unbiased") < 0
    for estimator in ("linear", "pairs"):
        assert mmd(x, x, estimator=estimator).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "linear", "pairs"])
@pytest.mark.parametrize("distance", [0.0, 1e-20])
def test_features_that_are_all_alike_have_a_finite_gradient(estimator, distance) -> None:
    """As of a layer of dead units: 0 · ∞ would put NaN into every weight."""
    x, y = torch.zeros(2, 3, requires_grad=True), torch.full((2, 3), distance, requires_grad=True)
    (1e6 * mmd(x, y, estimator=estimator)).backward()
    for z in (x, y):
        assert z.grad.isfinite().all()
        assert z.grad.abs().max() < 1e15


def test_order_matters_to_the_linear_estimators_alone() -> None:
    x, y, order = samples(6), samples(6, shift=1, seed=1), torch.tensor([3, 1, 0, 5, 4, 2])
    for estimator in ("unbiased", "biased"):
        assert torch.allclose(mmd(x[order], y, estimator=estimator), mmd(x, y, estimator=estimator), atol=1e-14)
    assert not torch.allclose(mmd(x[order], y, estimator="linear"), mmd(x, y, estimator="linear"))


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "linear", "pairs"])
@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 3)])
def test_symmetric_translation_invariant_and_differentiable(estimator, n, m) -> None:
    x, y = samples(n, 3), samples(m, 3, 0.5, 1)
    value = mmd(x, y, estimator=estimator)
    assert torch.allclose(value, mmd(y, x, estimator=estimator))
    assert torch.allclose(value, mmd(x + 100, y + 100, estimator=estimator), atol=1e-10)
    # No gradient flows through σ²: it is fixed for finite differences.
    assert torch.autograd.gradcheck(
        lambda a, b: mmd(a, b, variance=3.0, estimator=estimator), (x.requires_grad_(), y.requires_grad_())
    )


def test_no_gradient_through_the_variance() -> None:
    x, y = samples(4), samples(4, shift=1, seed=1)
    both = torch.cat([x, y])
    sigma = float((both[:, None] - both).square().sum(-1).mean())
    free, fixed = (x.clone().requires_grad_() for _ in range(2))
    mmd(free, y).backward()
    mmd(fixed, y, variance=sigma).backward()
    assert torch.allclose(free.grad, fixed.grad, atol=1e-14)


def test_linear_estimator_is_right_on_average_and_makes_no_matrix() -> None:
    x, y = samples(512, 2), samples(512, 2, 1.0, 1)
    shuffles = [torch.randperm(512, generator=torch.Generator().manual_seed(s)) for s in range(20)]
    mean = torch.stack([mmd(x[p], y[p.flip(0)], estimator="linear") for p in shuffles]).mean()
    assert mean.item() == pytest.approx(mmd(x, y).item(), rel=0.1)

    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.numel()) or t, lambda t: t):
        mmd(x.requires_grad_(), y, estimator="linear")
    assert max(shapes) <= 5 * 1024


def test_further_apart_is_more_and_far_apart_is_finite() -> None:
    x = samples(8)
    values = [mmd(x, samples(8, shift=s, seed=1), variance=4.0, estimator="biased").item() for s in (0, 1, 2)]
    assert values == sorted(values)
    for shift in (0.0, 1e4):
        a = torch.zeros(4, 3).requires_grad_()
        value = mmd(a, torch.full((4, 3), shift))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(a.grad).all()


def test_half_precision_is_computed_in_32_bits() -> None:
    x, y = samples(6).bfloat16(), samples(6, shift=1, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = mmd(x, y)
    assert value.dtype == torch.float32
    assert torch.allclose(value, mmd(x.float(), y.float()))


def test_refusals() -> None:
    with pytest.raises(UserError, match="unbiased"):
        mmd(samples(4), samples(4), estimator="unbiassed")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="too few"):
        mmd(samples(1), samples(4))


@pytest.mark.parametrize("estimator", ["linear", "pairs", "unbiased", "biased"])
def test_memory_of_the_linear_estimators_is_linear_in_the_batch(estimator) -> None:
    def kept(count: int) -> int:
        """Numbers that are kept for the backward pass."""
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
            alive.append(tensor)
            return tensor

        alive: list = []
        x, y = (torch.randn(count, 4, requires_grad=True) for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mmd(x, y, estimator=estimator).backward()
        return sum(found.values())

    once, twice = kept(128), kept(256)
    if estimator in ("linear", "pairs"):
        assert twice == pytest.approx(2 * once, rel=0.02)
        assert once < 128 * 200
    else:
        assert twice > 3.5 * once
