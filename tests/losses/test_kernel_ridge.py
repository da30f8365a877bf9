import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor

from zoo.losses import kernel_ridge, reverse_loss


def features(n: int, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_equals_scikit_learn() -> None:
    known, asked, values = features(6), features(3, seed=1), features(6, 2, seed=2)
    theirs = KernelRidge(alpha=0.1, kernel="cosine").fit(known.numpy(), values.numpy()).predict(asked.numpy())
    np.testing.assert_allclose(kernel_ridge(known, values, asked, 0.1), theirs, atol=1e-10)


def test_is_the_mean_square_of_centred_answers_on_the_source() -> None:
    x, y, labels, guesses = features(4), features(5, seed=1), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 1, 1])
    x_, y_ = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    one = torch.eye(3, dtype=torch.float64)
    answers = x_ @ y_.T @ torch.linalg.inv(y_ @ y_.T + 0.1 * torch.eye(5)) @ (one[guesses] - 1 / 3)
    wanted = ((answers - (one[labels] - 1 / 3)) ** 2).sum() / (4 * 3)
    assert torch.allclose(reverse_loss(x, labels, y, guesses, 3, 0.1), wanted)


def test_right_pseudo_labels_of_alike_features_cost_least() -> None:
    clean = torch.eye(3, 5, dtype=torch.float64).repeat(2, 1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    right = reverse_loss(clean, labels, clean, labels, 3)
    assert right.item() == pytest.approx(0, abs=1e-6)
    assert reverse_loss(clean, labels, clean, labels.roll(1), 3) > 0.3
    assert reverse_loss(clean, labels, -clean, labels, 3) > 0.5  # the features of the target are others


def test_gradients_reach_both_domains_and_sizes_may_differ() -> None:
    x, y = features(4).requires_grad_(), features(5, seed=1).requires_grad_()
    labels, guesses = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 1, 1])
    assert torch.autograd.gradcheck(lambda a, b: reverse_loss(a, labels, b, guesses, 3, 0.1), (x, y))


def test_single_precision_and_autocast() -> None:
    x, y = features(32, 16), features(32, 16, 1).abs()  # many alike
    labels = torch.arange(32) % 4
    wanted = reverse_loss(x, labels, y, labels, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = reverse_loss(x.float(), labels, y.float(), labels, 4)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-3)
