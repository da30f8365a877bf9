import math

import pytest
import torch
from torch.nn.functional import normalize

from zoo.core.errors import UserError
from zoo.losses import nearest_neighbor_loss


def example(size: int = 12, classes: int = 3):
    features = normalize(torch.randn(size, 4, dtype=torch.float64), dim=1).requires_grad_()
    return features, torch.arange(size) % classes, torch.eye(size).bool()


def test_all_neighbors_are_neighborhood_components_analysis() -> None:
    f, y, own = example()
    loss = nearest_neighbor_loss(f, y, f.detach(), y, neighbors=11, temperature=0.5, excluded=own)
    for i in range(12):
        weights = [math.exp((f[i] @ f[j]).item() / 0.5) if j != i else 0.0 for j in range(12)]
        right = sum(w for j, w in enumerate(weights) if y[j] == y[i])
        assert loss[i].item() == pytest.approx(-math.log(right / sum(weights)), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_by_brute_force(k) -> None:
    f, y, own = example()
    loss = nearest_neighbor_loss(f, y, f.detach(), y, neighbors=k, temperature=0.2, excluded=own)
    for i in range(12):
        ranked = sorted((j for j in range(12) if j != i), key=lambda j: -(f[i] @ f[j]).item())
        near = ranked[:k]
        if not any(y[j] == y[i] for j in near):
            near = [*near, next(j for j in ranked if y[j] == y[i])]
        weights = {j: math.exp((f[i] @ f[j]).item() / 0.2) for j in near}
        right = sum(w for j, w in weights.items() if y[j] == y[i])
        assert loss[i].item() == pytest.approx(-math.log(right / sum(weights.values())), abs=1e-10)


def test_only_neighbors_have_a_gradient() -> None:
    f, y, own = example()
    memory = f.detach().clone().requires_grad_()
    loss = nearest_neighbor_loss(f, y, memory, y, neighbors=3, temperature=0.2, excluded=own)
    (gradient,) = torch.autograd.grad(loss[0], memory)
    touched = set(gradient.abs().sum(1).nonzero().flatten().tolist())
    ranked = sorted(range(1, 12), key=lambda j: -(f[0] @ f[j]).item())
    nearest_right = next(j for j in ranked if y[j] == y[0])
    assert touched <= {*ranked[:3], nearest_right}
    assert 0 not in touched, "a sample is not its own neighbour"
    assert len(touched) >= 3


def test_own_rows_would_win_if_they_were_not_excluded() -> None:
    f, y, own = example()
    with_own = nearest_neighbor_loss(f, y, f.detach(), y, neighbors=1)
    assert not with_own.any()
    assert nearest_neighbor_loss(f, y, f.detach(), y, neighbors=1, excluded=own).any()


def test_order_of_the_memory_does_not_matter_and_empty_rows_are_not_there() -> None:
    f, y, own = example()
    memory, order = f.detach(), torch.randperm(12)
    loss = nearest_neighbor_loss(f, y, memory, y, 4, excluded=own)
    torch.testing.assert_close(nearest_neighbor_loss(f, y, memory[order], y[order], 4, excluded=own[:, order]), loss)
    padded = torch.cat([memory, torch.zeros(5, 4, dtype=torch.float64)])
    labels, mask = torch.cat([y, torch.full((5,), -1)]), torch.cat([own, torch.zeros(12, 5).bool()], dim=1)
    torch.testing.assert_close(nearest_neighbor_loss(f, y, padded, labels, 4, excluded=mask), loss)


def test_duplicates_stay_finite() -> None:
    f = torch.ones(6, 4, requires_grad=True)
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    loss = nearest_neighbor_loss(f, y, f.detach(), y, neighbors=2, temperature=0.01, excluded=torch.eye(6).bool())
    loss.sum().backward()
    assert loss.isfinite().all()
    assert f.grad.isfinite().all()
    assert (loss >= 0).all()


def test_without_a_right_row_or_any_row_the_loss_is_zero_with_a_gradient() -> None:
    f = torch.randn(2, 4, requires_grad=True)
    alone = nearest_neighbor_loss(f, torch.tensor([0, 5]), torch.randn(3, 4), torch.tensor([0, 0, 1]), 2)
    assert alone[1] == 0
    assert alone[0].isfinite()
    nothing = nearest_neighbor_loss(f, torch.tensor([0, 1]), torch.zeros(0, 4), torch.zeros(0).long(), 2)
    assert nothing.tolist() == [0.0, 0.0]
    empty = nearest_neighbor_loss(f, torch.tensor([0, 1]), torch.zeros(3, 4), torch.full((3,), -1), 2)
    assert empty.tolist() == [0.0, 0.0]
    (alone + nothing + empty).sum().backward()
    assert f.grad.isfinite().all()


def test_a_class_of_two_clusters_costs_nothing() -> None:
    # two far clusters of one class, and the other class nowhere near: cross-entropy on one direction could not
    centres = torch.eye(4)[[0, 1, 2, 3]]
    f = centres.repeat_interleave(4, 0)
    y = torch.tensor([0, 0, 1, 1]).repeat_interleave(4)
    loss = nearest_neighbor_loss(f, y, f, y, neighbors=3, excluded=torch.eye(16).bool())
    assert not loss.any()


@pytest.mark.parametrize("arguments", [{"neighbors": 0}, {"temperature": 0.0}])
def test_out_of_range(arguments) -> None:
    f, y, _ = example()
    with pytest.raises(UserError, match=next(iter(arguments))):
        nearest_neighbor_loss(f, y, f, y, **arguments)


def test_similarities_are_not_rounded_under_autocast() -> None:
    f = normalize(torch.randn(12, 64), dim=1)
    y = torch.arange(12) % 3
    plain = nearest_neighbor_loss(f, y, f, y, neighbors=5, temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(nearest_neighbor_loss(f, y, f, y, neighbors=5, temperature=0.05), plain)
