import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.losses.shrink import shrink_loss, shrunk_space

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "shrinkmatch.json").read_text())


def loop(logits: Tensor, probabilities: Tensor, threshold: float) -> tuple[Tensor, list[set[int]]]:
    """Sample by sample, class by class; where no cut is enough the loss is 0."""
    losses, spaces = [], []
    for z, p in zip(logits, probabilities, strict=True):
        order = p.argsort(descending=True).tolist()
        first, loss, space = order[0], z.sum() * 0, {order[0]}
        for cut in range(2, len(order)):
            kept = [first, *order[cut:]]
            if p[first] / p[kept].sum() >= threshold:
                loss, space = z[kept].logsumexp(0) - z[first], set(kept)
                break
        losses.append(loss)
        spaces.append(space)
    return torch.stack(losses), spaces


@pytest.mark.parametrize("threshold", [0.6, 0.95])
@pytest.mark.parametrize("classes", [3, 10, 100])
def test_a_loop_over_samples_and_classes_gives_the_same(classes, threshold) -> None:
    logits = torch.randn(40, classes, dtype=torch.float64, requires_grad=True)
    spread = torch.linspace(0.2, 4, 40, dtype=torch.float64).unsqueeze(1)  # hopeless to certain
    p = (torch.randn(40, classes, dtype=torch.float64) * spread).softmax(1)
    wanted, spaces = loop(logits, p, threshold)
    labels, stays = shrunk_space(p, threshold)
    losses = shrink_loss(logits, labels, stays)
    assert [set(row.nonzero().flatten().tolist()) for row in stays] == spaces
    assert len({len(space) for space in spaces}) > 1
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.rand(40, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((weights * x).sum(), logits)[0] for x in (losses, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_hand_example() -> None:
    # 0.5 / (0.5 + 0.1 + 0.1) = 0.71, 0.5 / (0.5 + 0.1) = 0.83: ranks 1 and 2 go, in whatever column they are
    p = torch.tensor([[0.1, 0.3, 0.5, 0.1]])
    labels, stays = shrunk_space(p, 0.8)
    assert labels.tolist() == [2]
    assert stays.sum() == 2
    assert not stays[0, 1]
    labels, stays = shrunk_space(p, 0.7)
    assert stays.tolist() == [[True, False, True, True]]
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0]])
    assert shrink_loss(logits, labels, stays).item() == pytest.approx(torch.tensor(3.0).log().item())


def test_golden_cifar() -> None:
    given, wanted = GOLDEN["inputs"], GOLDEN["outputs"]["cifar"]
    p = torch.tensor(given["weak_logits"], dtype=torch.float64).softmax(1)
    z = torch.tensor(given["auxiliary_logits"], dtype=torch.float64, requires_grad=True)
    labels, stays = shrunk_space(p, given["threshold"])
    confidence = p.amax(1)
    uncertain = confidence < given["threshold"]
    loss = (uncertain * confidence * shrink_loss(z, labels, stays)).sum()
    assert loss.item() == pytest.approx(wanted["sum"], rel=1e-6)
    gradient = torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(gradient, torch.tensor(wanted["gradient"], dtype=torch.float64), atol=1e-6, rtol=1e-5)
    cuts = p.shape[1] - stays.sum(1) + 1  # rank 0 stays, ranks 1 to cut - 1 go; alone, the loop stops at its last cut
    assert cuts[uncertain].clamp_max(p.shape[1] - 1).tolist() == wanted["cuts"]


def test_golden_stl() -> None:
    # the space is searched without alignment; who is uncertain, and by how much, is decided with it
    given, wanted = GOLDEN["inputs"], GOLDEN["outputs"]["stl"]
    raw = torch.tensor(given["weak_logits"], dtype=torch.float64).softmax(1)
    z = torch.tensor(given["auxiliary_logits"], dtype=torch.float64, requires_grad=True)
    aligned = raw / raw.mean(0)
    confidence = (aligned / aligned.sum(1, keepdim=True)).amax(1)
    loss = ((confidence < 0.95) * confidence * shrink_loss(z, *shrunk_space(raw, 0.95))).mean()
    assert loss.item() == pytest.approx(wanted["shrink"], rel=1e-6)
    gradient = torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(gradient, torch.tensor(wanted["gradient"], dtype=torch.float64), atol=1e-6, rtol=1e-5)


def test_a_lower_threshold_removes_no_more() -> None:
    p = (torch.randn(50, 12) * 2).softmax(1)
    spaces = [shrunk_space(p, threshold)[1] for threshold in (0.3, 0.6, 0.9, 0.99)]
    for larger, smaller in itertools.pairwise(spaces):
        assert (larger | ~smaller).all()
    assert (spaces[0].sum(1) > spaces[-1].sum(1)).any()
    assert (shrunk_space(p, 0.0)[1].sum(1) == 11).all()  # rank 1 goes whatever the threshold


def test_removed_logits_get_no_gradient_and_those_that_stay_do() -> None:
    z = torch.randn(30, 10, requires_grad=True)
    labels, stays = shrunk_space((torch.randn(30, 10) * 2).softmax(1), 0.8)
    shrink_loss(z, labels, stays).sum().backward()
    assert not z.grad[~stays].any()
    several = stays.sum(1) > 1
    assert several.any()
    assert (z.grad[several][stays[several]] != 0).all()


def test_out_of_reach_costs_nothing() -> None:
    p = torch.full((2, 5), 0.2)  # no cut makes a uniform prediction sure: 0.2 / 0.4
    z = torch.randn(2, 5, requires_grad=True)
    losses = shrink_loss(z, *shrunk_space(p, 0.6))
    losses.sum().backward()
    assert not losses.any()
    assert not z.grad.any()


def test_ties_keep_the_label_in_its_space() -> None:
    labels, stays = shrunk_space(torch.full((64, 100), 0.01), 0.5)
    assert stays.gather(1, labels.unsqueeze(1)).all()
    assert torch.isfinite(shrink_loss(torch.randn(64, 100), labels, stays)).all()


def test_classes_may_be_permuted() -> None:
    z, p, order = torch.randn(20, 9), (torch.randn(20, 9) * 2).softmax(1), torch.randperm(9)
    torch.testing.assert_close(
        shrink_loss(z, *shrunk_space(p, 0.9)), shrink_loss(z[:, order], *shrunk_space(p[:, order], 0.9))
    )


def test_extreme_logits_and_half_precision() -> None:
    z = torch.tensor([[1e4, -1e4, 3e4, 0.0]], requires_grad=True)
    losses = shrink_loss(z, *shrunk_space(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 0.95))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(z.grad).all()
    p = (torch.randn(50, 10) * 2).softmax(1).bfloat16()
    assert torch.equal(shrunk_space(p, 0.95)[1], shrunk_space(p.float(), 0.95)[1])
    half = torch.randn(50, 10).bfloat16()
    ours = shrink_loss(half, *shrunk_space(p, 0.95))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, shrink_loss(half.float(), *shrunk_space(p, 0.95)))
