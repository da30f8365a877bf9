import json

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from zoo.core.errors import UserError
from zoo.losses.decoupled_mixup import (
    decoupled_binary_cross_entropy,
    decoupled_cross_entropy,
    decoupled_regularizer,
    decoupled_terms,
    mixed_targets,
    rescale,
)


def example(batch: int = 7, classes: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = torch.randn(batch, classes, dtype=torch.float64, requires_grad=True)
    first = torch.randint(0, classes, (batch,))
    second = (first + torch.randint(1, classes, (batch,))) % classes
    return logits, first, second, torch.rand(batch, dtype=torch.float64)


@pytest.mark.parametrize(("share_power", "total"), [(0.0, 0.751625), (1.0, 0.725889)])
def test_worked_value(share_power, total) -> None:
    # z = (2, 1, 0): log-sum-exp 2.407606, without class 1 2.126928, without class 0 1.313262
    z, a, b, lam = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]), torch.tensor([1]), torch.tensor(0.7)
    terms = decoupled_terms(z, a, b)
    assert [term.item() for term in terms] == pytest.approx([2.126928 - 2, 1.313262 - 1], abs=1e-6)
    assert decoupled_cross_entropy(z, a, b, lam, eta=0.0).item() == pytest.approx(0.707606, abs=1e-6)
    loss = decoupled_cross_entropy(z, a, b, lam, eta=0.1, share_power=share_power)
    assert loss.item() == pytest.approx(total, abs=1e-6)


def test_terms_by_brute_force() -> None:
    logits, first, second, _ = example()
    for own, partner, term in [(first, second, 0), (second, first, 1)]:
        for i, value in enumerate(decoupled_terms(logits, first, second)[term].tolist()):
            others = [logits[i, c].exp().item() for c in range(5) if c != partner[i]]
            expected = -torch.tensor(logits[i, own[i]].exp().item() / sum(others), dtype=torch.float64).log()
            assert value == pytest.approx(expected.item(), abs=1e-12)


def test_a_class_is_decoupled_from_its_partner() -> None:
    logits, first, second, _ = example()
    (gradient,) = torch.autograd.grad(decoupled_terms(logits, first, second)[0].sum(), logits)
    rows = torch.arange(len(logits))
    assert not gradient[rows, second].any()
    assert (gradient[rows, first] < 0).all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(7, dtype=torch.float64))


def test_limits() -> None:
    logits, first, second, share = example()
    ones = torch.ones(7, dtype=torch.float64)
    plain = cross_entropy(logits, first, reduction="none")
    torch.testing.assert_close(decoupled_cross_entropy(logits, first, second, ones, eta=0.0), plain)
    torch.testing.assert_close(
        decoupled_cross_entropy(logits, first, second, ones, eta=2.0, share_power=1.0),
        plain + 2.0 * decoupled_terms(logits, first, second)[0],
    )
    soft = mixed_targets(first, second, share, 5)
    torch.testing.assert_close(soft.sum(1), ones)
    torch.testing.assert_close(
        decoupled_cross_entropy(logits, first, second, share, eta=0.0), cross_entropy(logits, soft, reduction="none")
    )


@pytest.mark.parametrize("share_power", [0.0, 0.5, 1.0])
def test_order_of_the_two_does_not_matter_and_halves_are_no_special_case(share_power) -> None:
    logits, first, second, share = example()
    share[0] = 0.5
    loss = decoupled_cross_entropy(logits, first, second, share, 0.3, share_power)
    torch.testing.assert_close(loss, decoupled_cross_entropy(logits, second, first, 1 - share, 0.3, share_power))
    assert (decoupled_regularizer(logits, first, second, share, share_power) > 0).all()


def test_pairs_of_one_class_have_the_plain_cross_entropy() -> None:
    logits, first, _, share = example()
    loss = decoupled_cross_entropy(logits, first, first, share, eta=5.0)
    torch.testing.assert_close(loss, cross_entropy(logits, first, reduction="none"))
    lonely = decoupled_cross_entropy(torch.zeros(2, 1), torch.zeros(2).long(), torch.zeros(2).long(), torch.rand(2))
    assert lonely.tolist() == [0.0, 0.0]


def test_two_classes_leave_nothing_to_tell_apart() -> None:
    logits, a, b = torch.randn(3, 2, requires_grad=True), torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1])
    regularizer = decoupled_regularizer(logits, a, b, torch.full((3,), 0.4))
    assert regularizer.tolist() == [0.0] * 3
    (gradient,) = torch.autograd.grad(regularizer.sum(), logits)
    assert not gradient.any()


def test_extreme_logits_stay_finite_and_half_precision_is_left() -> None:
    z = torch.tensor([[1000.0, -1000.0, 0.0]], requires_grad=True)
    loss = decoupled_cross_entropy(z, torch.tensor([1]), torch.tensor([0]), torch.tensor([0.5]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert z.grad.isfinite().all()
    half = torch.randn(4, 6, dtype=torch.bfloat16)
    a, b, lam = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 2, 0]), torch.rand(4)
    loss = decoupled_cross_entropy(half, a, b, lam)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, decoupled_cross_entropy(half.float(), a, b, lam))


def test_rescaled_shares() -> None:
    assert rescale(torch.tensor([0.0, 0.4, 0.8, 1.0]), 0.8, 2.0).tolist() == pytest.approx([0.0, 0.25, 1.0, 1.0])
    with pytest.raises(UserError, match="threshold=0"):
        rescale(torch.rand(1), threshold=0.0)
    with pytest.raises(UserError, match="power=-1"):
        rescale(torch.rand(1), power=-1.0)


def test_binary_form_by_hand() -> None:
    z, a, b = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 2]), torch.tensor([1, 2])
    z[0] = torch.tensor([1.0, -1.0, 0.5])
    loss = decoupled_binary_cross_entropy(z, a, b, torch.tensor(0.6), threshold=0.5, power=1.0)
    # answers (1, 0.8, 0), and (0, 0, 1): that of one class twice is cut
    sigmoid = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64).sigmoid()
    first = -(sigmoid[0].log() + 0.8 * sigmoid[1].log() + 0.2 * (1 - sigmoid[1]).log() + (1 - sigmoid[2]).log())
    assert loss.tolist() == pytest.approx([first.item(), 3 * 0.6931471805599453])


def test_reference_figures(root) -> None:
    golden = json.loads((root / "tests/golden/decoupled_mixup.json").read_text())
    given = golden["inputs"]
    z, a, b = (torch.tensor(given[key]) for key in ("logits", "first", "second"))
    kept = torch.tensor([row for row in range(len(a)) if row != given["one_class_row"]])
    for case in golden["outputs"]["softmax"]:
        logits, lam = z[kept].clone().requires_grad_(), torch.tensor(case["share"])
        loss = decoupled_cross_entropy(logits, a[kept], b[kept], lam, case["eta"], case["share_power"]).mean()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, torch.tensor(case["gradient"]), rtol=1e-5, atol=1e-6)
    for case in golden["outputs"]["softmax_all"]:
        loss = decoupled_cross_entropy(z, a, b, torch.tensor(case["share"]), case["eta"], case["share_power"]).mean()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    for case in golden["outputs"]["binary"]:
        lam = torch.tensor(case["share"])
        loss = decoupled_binary_cross_entropy(z[kept], a[kept], b[kept], lam, case["threshold"], case["power"]).mean()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-5)


def test_mixed_targets_broadcast_one_share() -> None:
    a, b = torch.tensor([0, 1]), torch.tensor([1, 1])
    expected = 0.25 * one_hot(a, 3) + 0.75 * one_hot(b, 3)
    torch.testing.assert_close(mixed_targets(a, b, torch.tensor(0.25), 3), expected)


@pytest.mark.parametrize("share_power", [0.0, 0.5, 1.0])
def test_a_class_that_is_not_in_the_sample_is_not_asked_for(share_power) -> None:
    logits, first, second, _ = example()
    ones = torch.ones(7, dtype=torch.float64)
    own, partner = decoupled_terms(logits, first, second)
    assert torch.equal(decoupled_regularizer(logits, first, second, ones, share_power), own)
    assert torch.equal(decoupled_regularizer(logits, first, second, 1 - ones, share_power), partner)
