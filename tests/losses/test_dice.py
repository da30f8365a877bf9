import json

import pytest
import torch
from torch.nn.functional import one_hot

from zoo.losses import dice_loss, self_adjusting_dice_loss


def example(batch: int = 9, classes: int = 4):
    p = torch.randn(batch, classes, dtype=torch.float64).softmax(1)
    return p, one_hot(torch.randint(0, classes, (batch,)), classes).double()


def test_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    y = torch.tensor([[1, 0], [0, 1]])
    # class 0: overlap 0.5, sums 0.75 + 1; class 1: overlap 0.75, sums 1.25 + 1
    assert dice_loss(p, y, 0.0).tolist() == pytest.approx([1 - 1 / 1.75, 1 - 1.5 / 2.25])
    assert dice_loss(p, y, 1.0).tolist() == pytest.approx([1 - 2 / 2.75, 1 - 2.5 / 3.25])
    assert dice_loss(p, y, 0.0, square_denominator=True)[0].item() == pytest.approx(1 - 1 / (0.25 + 0.0625 + 1))
    discounted = dice_loss(p, y, 0.0, alpha=1.0)[0].item()
    assert discounted == pytest.approx(1 - 2 * 0.25 / (0.25 + 0.1875 + 1))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_by_brute_force(alpha, square) -> None:
    p, y = example()
    power = 2 if square else 1
    for c in range(4):
        q = [(1 - v) ** alpha * v for v in p[:, c].tolist()]
        t = y[:, c].tolist()
        below = sum(v**power for v in q) + sum(v**power for v in t)
        expected = 1 - (2 * sum(a * b for a, b in zip(q, t, strict=True)) + 0.3) / (below + 0.3)
        assert dice_loss(p, y, 0.3, alpha, square)[c].item() == pytest.approx(expected, abs=1e-12)
        for b, (own, target) in enumerate(zip(q, t, strict=True)):
            expected = 1 - (2 * own * target + 0.3) / (own**power + target**power + 0.3)
            got = self_adjusting_dice_loss(p, y, 0.3, alpha, square)[b, c].item()
            assert got == pytest.approx(expected, abs=1e-12)


def test_perfect_predictions_cost_nothing_and_hard_ones_are_one_minus_f1() -> None:
    _, y = example(40)
    assert not dice_loss(y, y).any()
    assert not self_adjusting_dice_loss(y, y, alpha=0.0).any()
    guessed = one_hot(torch.randint(0, 4, (40,)), 4).double()
    for c in range(4):
        hits, wrong = (guessed[:, c] * y[:, c]).sum(), (guessed[:, c] != y[:, c]).sum()
        assert dice_loss(guessed, y, 0.0)[c].item() == pytest.approx(1 - (2 * hits / (2 * hits + wrong)).item())


def test_order_of_samples_and_classes_does_not_matter() -> None:
    p, y = example()
    rows, columns = torch.randperm(9), torch.randperm(4)
    loss = dice_loss(p, y, alpha=0.5)
    torch.testing.assert_close(dice_loss(p[rows], y[rows], alpha=0.5), loss)
    torch.testing.assert_close(dice_loss(p[:, columns], y[:, columns], alpha=0.5), loss[columns])


def test_masked_rows_are_as_if_they_were_not_there() -> None:
    p, y = example()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0])
    kept = mask.bool()
    torch.testing.assert_close(dice_loss(p, y, mask=mask), dice_loss(p[kept], y[kept]))
    assert dice_loss(p, y, mask=torch.zeros(9)).tolist() == [0.0] * 4


def test_the_factor_pulls_sure_predictions_back_unless_it_is_detached() -> None:
    for p, detach, sign in [(0.4, False, -1), (0.9, False, 1), (0.4, True, -1), (0.9, True, -1)]:
        x = torch.tensor([[p]], requires_grad=True)
        self_adjusting_dice_loss(x, torch.ones(1, 1), detach_factor=detach).sum().backward()
        assert x.grad.sign().item() == sign, (p, detach)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0])
def test_gradients_are_finite_at_the_ends(alpha) -> None:
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    y = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    (dice_loss(p, y, alpha=alpha).sum() + self_adjusting_dice_loss(p, y, alpha=alpha).sum()).backward()
    assert p.grad.isfinite().all()


def test_two_ranks_are_one_batch(on_ranks) -> None:
    logits, y = torch.randn(8, 3), one_hot(torch.arange(8) % 3, 3)

    def work(rank: int) -> list[torch.Tensor]:
        z = logits[rank::2].clone().requires_grad_()
        loss = dice_loss(z.softmax(1), y[rank::2], alpha=0.5)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        return [loss.detach(), gradient / 2]  # ddp's mean over two ranks

    z = logits.clone().requires_grad_()
    loss = dice_loss(z.softmax(1), y, alpha=0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    for rank, (value, part) in enumerate(on_ranks(work)):
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(part, gradient[rank::2])


def test_reference_figures(root) -> None:
    golden = json.loads((root / "tests/golden/dice.json").read_text())
    given = golden["inputs"]
    logits, y, mask = torch.tensor(given["logits"]), one_hot(torch.tensor(given["labels"]), 4), given["mask"]
    for case in golden["outputs"]["pooled"]:
        z = logits.clone().requires_grad_()
        options = {name: case[name] for name in ("smoothing", "alpha", "square_denominator")}
        loss = dice_loss(z.softmax(1), y, **options, mask=torch.tensor(mask) if case["masked"] else None)
        assert loss.tolist() == pytest.approx(case["losses"], abs=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        torch.testing.assert_close(gradient, torch.tensor(case["gradient"]), rtol=1e-5, atol=1e-6)
    for case in golden["outputs"]["each"]:
        z = logits.clone().requires_grad_()
        loss = self_adjusting_dice_loss(z.softmax(1), y, case["smoothing"], case["alpha"], square_denominator=True)
        loss = loss.sum(1).mean()
        assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, z)
        torch.testing.assert_close(gradient, torch.tensor(case["gradient"]), rtol=1e-5, atol=1e-6)
