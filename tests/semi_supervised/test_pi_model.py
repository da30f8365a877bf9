import math

import pytest
import torch
from torch import Tensor, nn

from zoo import PiModel, Supervised


class Small(nn.Module):
    def __init__(self, num_outputs: int, norm: bool = False) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), nn.Linear(6, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Norm(Small):
    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs, norm=True)


def build(progress: float = 1.0, network: type = Small, seed: int = 0, **arguments) -> PiModel:
    torch.manual_seed(seed)
    kind = type("At", (PiModel,), {"progress": progress})
    method = kind(network=network, num_classes=3, **arguments)
    method.configure_model()
    return method


def batch() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    unlabeled = {"weak": torch.randn(9, 4), "weak_2": torch.randn(9, 4)}
    return {"labeled": {"image": torch.randn(5, 4), "label": torch.tensor([0, 1, 2, 0, 1])}, "unlabeled": unlabeled}


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_against_a_loop(forward_pass, symmetric) -> None:
    method, b = build(forward_pass=forward_pass, unlabeled_weight=7.0, symmetric=symmetric), batch()
    first, second = (method.network(b["unlabeled"][view]).softmax(1) for view in ("weak", "weak_2"))
    distance = sum((first[i, c] - second[i, c]) ** 2 for i in range(9) for c in range(3)) / 27
    supervised = nn.functional.cross_entropy(method.network(b["labeled"]["image"]), b["labeled"]["label"])
    torch.testing.assert_close(method.training_step(b, 0), supervised + 7 * distance)


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_the_second_view_follows_the_first(forward_pass) -> None:
    b = batch()
    for view in b["unlabeled"].values():
        view.requires_grad_()
    build(forward_pass=forward_pass).training_step(b, 0).backward()
    first, second = (b["unlabeled"][view].grad for view in ("weak", "weak_2"))
    assert first is None or not first.any()
    assert second.abs().sum() > 0


def test_symmetric_both_views_move() -> None:
    b = batch()
    for view in b["unlabeled"].values():
        view.requires_grad_()
    build(symmetric=True).training_step(b, 0).backward()
    assert all(view.grad.abs().sum() > 0 for view in b["unlabeled"].values())


def test_equal_views_agree_and_the_loss_is_supervised() -> None:
    b = batch()
    b["unlabeled"]["weak_2"] = b["unlabeled"]["weak"].clone()
    torch.testing.assert_close(build().training_step(b, 0), build(unlabeled_weight=0.0).training_step(b, 0))


@pytest.mark.parametrize(("progress", "expected"), [(0.0, math.exp(-5)), (0.2, math.exp(-1.25)), (0.4, 1), (1.0, 1)])
def test_the_ramp_is_the_papers_gaussian(progress, expected) -> None:
    assert build(progress, ramp=0.4).ramped == pytest.approx(expected)
    zero, full, now = (
        build(p, ramp=r, unlabeled_weight=w).training_step(batch(), 0).item()
        for p, r, w in ((1.0, 0.4, 0.0), (1.0, 0.4, 10.0), (progress, 0.4, 10.0))
    )
    assert now - zero == pytest.approx(expected * (full - zero), rel=1e-4)


def test_weight_zero_is_supervised_bit_for_bit_even_with_batch_norm() -> None:
    gradients = []
    for method in (build(network=Norm, unlabeled_weight=0.0), Supervised(network=Norm, num_classes=3)):
        torch.manual_seed(0)
        method.built = False
        method.configure_model()
        loss = method.training_step(batch(), 0)
        loss.backward()
        statistics = list(method.network.buffers())
        gradients.append([loss.detach(), *(p.grad for p in method.network.parameters()), *statistics])
    assert all(map(torch.equal, *gradients))


def test_the_order_of_unlabeled_samples_does_not_matter() -> None:
    b, method = batch(), build(network=Norm)
    loss = method.training_step(b, 0)
    order = torch.randperm(9)
    b["unlabeled"] = {view: x[order] for view, x in b["unlabeled"].items()}
    torch.testing.assert_close(method.training_step(b, 0), loss)
