import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.losses import mix, mixing_shares, sharpen, squared_error

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mixmatch.json").read_text())


def given(name: str) -> Tensor:
    value = torch.tensor(GOLDEN["inputs"][name])
    return value.double() if value.is_floating_point() else value


def test_hand_figure() -> None:
    x, targets = torch.tensor([[0.0, 10.0], [4.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mixed, soft = mix(x, targets, 0.75, torch.tensor([1, 0]))
    assert mixed.tolist() == [[1.0, 8.0], [3.0, 4.0]]
    assert soft.tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_one_share_for_every_sample_against_a_loop() -> None:
    x, targets = torch.randn(6, 2, 3, 3).double(), torch.rand(6, 4).double().softmax(1)
    lam, permutation = torch.rand(6), torch.randperm(6)
    mixed, soft = mix(x, targets, lam, permutation)
    for b, (share, other) in enumerate(zip(lam.double(), permutation, strict=True)):
        torch.testing.assert_close(mixed[b], share * x[b] + (1 - share) * x[other])
        torch.testing.assert_close(soft[b], share * targets[b] + (1 - share) * targets[other])
    torch.testing.assert_close(soft.sum(1), torch.ones(6).double())


def test_share_one_is_no_mixing_and_share_zero_is_the_other_sample() -> None:
    x, targets, permutation = torch.randn(5, 3), torch.rand(5, 2), torch.randperm(5)
    assert all(map(torch.equal, mix(x, targets, 1.0, permutation), (x, targets)))
    assert all(map(torch.equal, mix(x, targets, torch.ones(5), permutation), (x, targets)))
    assert all(map(torch.equal, mix(x, targets, 0.0, permutation), (x[permutation], targets[permutation])))


@pytest.mark.parametrize("alpha", [0.01, 0.75, 4.0])
def test_dominant_shares_are_those_of_the_beta_distribution_folded(alpha) -> None:
    lam = mixing_shares(4000, alpha)
    assert lam.min() >= 0.5
    assert lam.max() <= 1.0
    free = mixing_shares(20000, alpha, dominant=False)
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(α, α)
    assert free.mean().item() == pytest.approx(0.5, abs=0.02)
    assert free.var().item() == pytest.approx(variance, rel=0.1)
    assert (lam - 0.5).square().mean().item() == pytest.approx(variance, rel=0.1)


def test_alpha_towards_zero_mixes_nothing() -> None:
    assert torch.equal(mixing_shares(9, 0.0), torch.ones(9))
    assert mixing_shares(1000, 1e-3).mean() > 0.99


def test_sharpen_limits() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.25, 0.75]])
    torch.testing.assert_close(sharpen(p, 1.0), p)
    torch.testing.assert_close(sharpen(p, 0.5), p.square() / p.square().sum(1, keepdim=True))
    torch.testing.assert_close(sharpen(p, 1e-3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(sharpen(p, 1e6), torch.tensor([[1 / 3] * 3, [0.0, 0.5, 0.5]]))  # impossible stays so
    with pytest.raises(ValueError, match="temperature=0"):
        sharpen(p, 0)


def test_reference_figures() -> None:
    z = [given("logits_1"), given("logits_2")]
    guesses = sharpen((z[0].softmax(1) + z[1].softmax(1)) / 2, GOLDEN["inputs"]["temperature"])
    torch.testing.assert_close(guesses, torch.tensor(GOLDEN["outputs"]["guesses"]).double())

    labels = torch.nn.functional.one_hot(given("labels"), 4).double()
    share = max(GOLDEN["inputs"]["lam"], 1 - GOLDEN["inputs"]["lam"])
    x, targets = mix(given("x"), torch.cat([labels, guesses, guesses]), share, given("permutation"))
    torch.testing.assert_close(x, torch.tensor(GOLDEN["outputs"]["mixed_x"]).double())
    torch.testing.assert_close(targets, torch.tensor(GOLDEN["outputs"]["mixed_targets"]).double())

    logits = x.flatten(1) @ given("w").T
    supervised = torch.nn.functional.cross_entropy(logits[:2], targets[:2])
    assert supervised.item() == pytest.approx(GOLDEN["outputs"]["supervised"], rel=1e-6)
    unlabeled = squared_error(logits[2:], targets[2:])
    assert unlabeled.item() == pytest.approx(GOLDEN["outputs"]["unlabeled"], rel=1e-6)
