import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zoo import PseudoLabel, Supervised
from zoo.core.errors import UserError
from zoo.policies import Threshold


class Given(nn.Module):
    """Logits are the input itself, times one weight."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Normalised(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class At(PseudoLabel):
    """At a given share of the training."""

    progress = 1.0


def build(kind: type = At, network: type = Given, **arguments) -> PseudoLabel:
    method = kind(network=network, num_classes=2, **arguments)
    method.configure_model()
    return method


def batch(x: Tensor, weak: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"labeled": {"image": x, "label": torch.zeros(len(x), dtype=torch.long)}, "unlabeled": {"weak": weak}}


EXAMPLE = (torch.zeros(1, 2), torch.tensor([[4.0, 0.0], [0.0, 3.0], [0.1, 0.0]]))


def test_loss_by_hand() -> None:
    # kept: 0.982 for class 0 and 0.953 for class 1, each against itself; the mean runs over all three
    own = (math.log(1 + math.exp(-4.0)) + math.log(1 + math.exp(-3.0))) / 3
    loss = build(policy=partial(Threshold, threshold=0.95), unlabeled_weight=2.0).training_step(batch(*EXAMPLE), 0)
    assert loss.item() == pytest.approx(math.log(2) + 2 * own, rel=1e-6)


def test_without_a_threshold_it_is_lees() -> None:
    own = sum(math.log(1 + math.exp(-m)) for m in (4.0, 3.0, 0.1)) / 3
    loss = build(policy=partial(Threshold, threshold=1e-6), unlabeled_weight=3.0).training_step(batch(*EXAMPLE), 0)
    assert loss.item() == pytest.approx(math.log(2) + 3 * own, rel=1e-6)


def test_gradient_makes_surer_and_leaves_the_unsure_alone() -> None:
    x, weak = EXAMPLE[0], EXAMPLE[1].clone().requires_grad_()
    build().training_step(batch(x, weak), 0).backward()
    p = EXAMPLE[1].softmax(1)
    expected = (p - nn.functional.one_hot(p.argmax(1), 2)) / 3  # of cross-entropy with a constant target
    expected[2] = 0
    torch.testing.assert_close(weak.grad, expected)


@pytest.mark.parametrize(
    ("progress", "ramp", "expected"), [(0.0, 0.4, 0), (0.1, 0.4, 0.25), (0.9, 0.4, 1), (0.0, 0.0, 1)]
)
def test_the_ramp_is_linear(progress, ramp, expected) -> None:
    method = build(type("Now", (PseudoLabel,), {"progress": progress}), ramp=ramp)
    assert method.ramped == pytest.approx(expected)
    unlabeled = build(ramp=0.0).training_step(batch(*EXAMPLE), 0) - math.log(2)
    loss = method.training_step(batch(*EXAMPLE), 0)
    assert loss.item() == pytest.approx(math.log(2) + expected * unlabeled.item(), rel=1e-5)


def statistics(method: PseudoLabel) -> list[Tensor]:
    return [buffer.clone() for buffer in method.network.buffers()]


def test_unlabeled_samples_do_not_move_batch_norm_unless_joint() -> None:
    x, weak = torch.randn(8, 4), torch.randn(16, 4) * 9
    torch.manual_seed(0)
    split = build(network=Normalised)
    torch.manual_seed(0)
    joint = build(network=Normalised, forward_pass="joint")
    torch.manual_seed(0)
    supervised = Supervised(network=Normalised, num_classes=2)
    supervised.configure_model()
    for method in (split, joint, supervised):
        method.training_step(batch(x, weak), 0)
    assert all(map(torch.equal, statistics(split), statistics(supervised)))
    assert not all(map(torch.equal, statistics(joint), statistics(supervised)))


def test_weight_zero_is_the_supervised_baseline_bit_for_bit() -> None:
    b = batch(torch.randn(8, 4), torch.randn(16, 4))
    gradients = []
    for kind, arguments in ((At, {"unlabeled_weight": 0.0}), (Supervised, {})):
        torch.manual_seed(0)
        method = build(kind, network=Normalised, **arguments)
        loss = method.training_step(b, 0)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in method.network.parameters())])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_unlabeled_term_has_a_gradient_of_its_own_and_no_order(forward_pass) -> None:
    torch.manual_seed(0)
    method = build(network=Normalised, policy=partial(Threshold, threshold=0.5), forward_pass=forward_pass)
    x, weak = torch.randn(8, 4), torch.randn(16, 4)
    losses = [method.training_step(batch(x, u), 0) for u in (weak, weak[torch.randperm(16)])]
    torch.testing.assert_close(*losses)
    gradient = torch.autograd.grad(losses[0], list(method.network.parameters()))
    method.unlabeled_weight = 0.0
    supervised = torch.autograd.grad(method.training_step(batch(x, weak), 0), list(method.network.parameters()))
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(gradient, supervised, strict=True))


@pytest.mark.parametrize("arguments", [{"ramp": 1.5}, {"ramp": -0.1}, {"unlabeled_weight": -1.0}])
def test_arguments_out_of_range_are_named(arguments) -> None:
    (name,) = arguments
    with pytest.raises(UserError, match=f"At: {name}="):
        build(**arguments)
