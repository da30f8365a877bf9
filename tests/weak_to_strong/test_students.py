import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from zoo import ConfidenceWeakToStrong, NaiveWeakToStrong, Supervised
from zoo.core.network import Network

NETWORK = partial(Network, backbone="lenet", in_channels=1)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def batch(size: int = 8, classes: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(size, classes, generator=generator).mul(2).softmax(1)
    images = torch.randn(size, 1, 28, 28, generator=generator)
    return {"weak": {"image": images, "probabilities": probabilities, "label": probabilities.argmax(1)}}


def method(cls: type, progress: float = 1.0, classes: int = 3, **arguments):
    torch.manual_seed(0)
    made = cls(network=NETWORK, num_classes=classes, optimizer=SGD, **arguments)
    made.configure_model()
    made._trainer = SimpleNamespace(
        global_step=round(progress * 1000),
        estimated_stepping_batches=1000,
        training=False,
    )
    return made


def train(made, b: dict, steps: int = 3) -> None:
    optimizer = made.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        made.training_step(b, 0).backward()
        optimizer.step()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.network.parameters(), b.network.parameters(), strict=True))


def test_naive_is_cross_entropy_with_the_weak_probabilities() -> None:
    made, weak = method(NaiveWeakToStrong), batch()["weak"]
    by_hand = -(weak["probabilities"] * made.network(weak["image"]).log_softmax(1)).sum(1).mean()
    assert made.training_step(batch(), 0).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_hard_labels_are_supervised_learning_on_the_arg_max() -> None:
    made, weak = method(NaiveWeakToStrong, hard_labels=True), batch()["weak"]
    baseline = method(Supervised)
    loss = baseline.training_step({"labeled": {"image": weak["image"], "label": weak["label"]}}, 0)
    assert made.training_step(batch(), 0).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("hard_labels", [False, True])
def test_confidence_weight_zero_is_naive_bit_for_bit(hard_labels) -> None:
    ours = method(ConfidenceWeakToStrong, confidence_weight=0.0, hard_labels=hard_labels)
    naive = method(NaiveWeakToStrong, hard_labels=hard_labels)
    train(ours, batch())
    train(naive, batch())
    assert same(ours, naive)


def test_before_the_first_step_it_is_naive_too() -> None:
    ours, naive = method(ConfidenceWeakToStrong, progress=0.0), method(NaiveWeakToStrong)
    assert torch.equal(ours.training_step(batch(), 0), naive.training_step(batch(), 0))


def test_loss_is_equation_1_and_its_gradient_softmax_minus_mixed_target() -> None:
    made, weak = method(ConfidenceWeakToStrong, confidence_weight=0.75), batch()["weak"]
    logits = made.network(weak["image"])
    p = logits.softmax(1).detach()
    # after one batch the running means are the batch's own
    own = (p * weak["probabilities"].mean(0) / p.mean(0)).argmax(1)
    target = 0.25 * weak["probabilities"] + 0.75 * F.one_hot(own, 3)
    wanted = -(target * logits.log_softmax(1)).sum(1).mean()
    made.training_step(batch(), 0).backward()
    (gradient,) = torch.autograd.grad(logits, made.network.head.bias, (p - target) / 8)
    assert torch.allclose(made.network.head.bias.grad, gradient, atol=1e-6)
    again = method(ConfidenceWeakToStrong, confidence_weight=0.75)
    assert again.training_step(batch(), 0).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_warm_up_is_linear_over_the_first_fifth(progress) -> None:
    made = method(ConfidenceWeakToStrong, progress, confidence_weight=0.5)
    assert made.alpha == pytest.approx(0.5 * min(1, progress / 0.2))
    released = method(ConfidenceWeakToStrong, progress, confidence_weight=0.5, warmup=0.1, released_ramp=True)
    assert released.alpha == pytest.approx(0.5 * (1.0 if progress > 0.1 else progress))


def test_two_classes_are_as_frequent_as_in_the_weak_labels() -> None:
    made, b = method(ConfidenceWeakToStrong, classes=2), batch(100, 2)["weak"]
    logits = torch.randn(100, 2) + torch.tensor([4.0, 0.0])  # by itself it would call nearly all of them 0
    own = made.confident(logits, b["probabilities"])
    assert own.float().mean().item() == pytest.approx(b["probabilities"][:, 1].mean().item(), abs=0.5 / 100 + 1e-6)


def test_without_the_prior_it_is_the_plain_arg_max() -> None:
    made, logits = method(ConfidenceWeakToStrong, match_prior=False), torch.randn(9, 3)
    assert torch.equal(made.confident(logits, batch(9)["weak"]["probabilities"]), logits.argmax(1))


def test_running_means_start_as_plain_means_and_are_saved() -> None:
    made = method(ConfidenceWeakToStrong, momentum=0.5)
    seen = [torch.rand(4, 3).softmax(1) for _ in range(3)]
    for weak in seen:
        made.confident(torch.zeros(4, 3), weak)
    first, second, third = (weak.mean(0) for weak in seen)
    assert torch.allclose(made.prior, ((first + second) / 2 + third) / 2)
    assert torch.allclose(made.marginal, torch.full((3,), 1 / 3))
    assert {"prior", "marginal", "batches"} <= set(made.state_dict())


def test_confidence_pulls_away_from_a_wrong_supervisor() -> None:
    """A student surely of class 0 on samples that the supervisor calls 1: the own term points back to 0."""
    logits = torch.tensor([[4.0, 0.0, 0.0]]).repeat(6, 1).requires_grad_()
    weak = torch.tensor([[0.0, 1.0, 0.0]]).repeat(6, 1)
    made = method(ConfidenceWeakToStrong, confidence_weight=0.75, match_prior=False)
    own = made.confident(logits, weak)
    loss = 0.25 * F.cross_entropy(logits, weak) + 0.75 * F.cross_entropy(logits, own)
    (gradient,) = torch.autograd.grad(loss, logits)
    (naive,) = torch.autograd.grad(F.cross_entropy(logits, weak), logits)
    assert (naive[:, 0] > 0).all()  # descent takes class 0 away
    assert (gradient[:, 0] < naive[:, 0]).all()
    assert loss.item() == pytest.approx(0.25 * 4 + math.log(1 + 2 * math.exp(-4)), rel=1e-5)


@pytest.mark.parametrize("name", ["confidence_weight", "warmup"])
def test_refusals(name) -> None:
    with pytest.raises(ValueError, match=f"{name}=1.5"):
        method(ConfidenceWeakToStrong, **{name: 1.5})
    with pytest.raises(ValueError, match="momentum=1"):
        method(ConfidenceWeakToStrong, momentum=1)
