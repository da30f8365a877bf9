import math

import pytest
import torch
from torch import Tensor, nn

from zoo import NoisyStudent, SelfTraining, Supervised
from zoo.core.errors import UserError


class Given(nn.Module):
    """Logits are the input itself, times one weight, so that a batch spells out the predictions."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Small(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def method(kind=SelfTraining, network=Given, num_classes=2, **arguments):
    torch.manual_seed(0)
    built = kind(network=network, num_classes=num_classes, **arguments)
    built.configure_model()
    return built


def example() -> dict[str, dict[str, Tensor]]:
    """Cross-entropies against the targets: weak log 2, log 2, 0; strong log 2, 9, log 2."""
    zero, sure = [0.0, 0.0], [0.0, 99.0]
    return {
        "labeled": {"image": torch.tensor([zero]), "strong": torch.tensor([sure]), "label": torch.tensor([1])},
        "unlabeled": {
            "weak": torch.tensor([zero, zero, sure], requires_grad=True),
            "strong": torch.tensor([zero, [9.0, 0.0], zero], requires_grad=True),
            "pseudo_label": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
            "pseudo_label_weight": torch.tensor([1.0, 0.5, 0.5]),
        },
    }


def random_batch(labeled: int = 4, unlabeled: int = 6, classes: int = 3) -> dict[str, dict[str, Tensor]]:
    return {
        "labeled": {"image": torch.randn(labeled, 5), "label": torch.randint(classes, (labeled,))},
        "unlabeled": {
            "weak": torch.randn(unlabeled, 5),
            "pseudo_label": torch.randn(unlabeled, classes).softmax(1),
            "pseudo_label_weight": torch.tensor([1.0, 0.0, 1.0, 0.25, 1.0, 0.5])[:unlabeled],
        },
    }


def gradients(built, batch) -> list[Tensor]:
    built.zero_grad()
    built.training_step(batch, 0).backward()
    return [p.grad.clone() for p in built.network.parameters()]


@pytest.mark.parametrize(
    ("arguments", "unlabeled"),
    [
        ({}, (1.0 * math.log(2) + 0.5 * math.log(2)) / 2),
        ({"mean_over": "all"}, (1.0 * math.log(2) + 0.5 * math.log(2)) / 3),
        ({"view": "strong"}, (math.log(2) + 0.5 * (9 + math.log1p(math.exp(-9))) + 0.5 * math.log(2)) / 2),
        ({"unlabeled_weight": 3.0}, 3 * (1.0 * math.log(2) + 0.5 * math.log(2)) / 2),
    ],
)
def test_loss_by_hand(arguments, unlabeled) -> None:
    loss = method(**arguments).training_step(example(), 0)
    assert loss.item() == pytest.approx(math.log(2) + unlabeled)


def test_soft_targets() -> None:
    batch = example()
    batch["unlabeled"] |= {"weak": torch.tensor([[0.0, 2.0]]), "pseudo_label": torch.tensor([[0.3, 0.7]])}
    batch["unlabeled"]["pseudo_label_weight"] = torch.ones(1)
    p = torch.tensor([0.0, 2.0]).log_softmax(0)
    expected = math.log(2) - 0.3 * p[0].item() - 0.7 * p[1].item()
    assert method().training_step(batch, 0).item() == pytest.approx(expected)


def test_samples_of_weight_zero_have_no_gradient_and_targets_have_none() -> None:
    batch = example()
    batch["unlabeled"]["pseudo_label_weight"] = torch.tensor([1.0, 0.0, 1.0])
    targets = batch["unlabeled"]["pseudo_label"]
    method().training_step(batch, 0).backward()
    gradient = batch["unlabeled"]["weak"].grad
    assert gradient[0].any()
    assert not gradient[1].any()
    assert not targets.requires_grad


@pytest.mark.parametrize("weights", ["no weights", "no factor"])
def test_without_pseudo_labels_it_is_supervised_learning_bit_for_bit(weights) -> None:
    batch = random_batch()
    if weights == "no weights":
        batch["unlabeled"]["pseudo_label_weight"].zero_()
        batch["unlabeled"]["pseudo_label"].zero_()
    factor = 0.0 if weights == "no factor" else 1.0
    own = method(network=Small, num_classes=3, unlabeled_weight=factor)
    supervised = method(Supervised, network=Small, num_classes=3)
    for a, b in zip(gradients(own, batch), gradients(supervised, batch), strict=True):
        assert torch.equal(a, b)


def test_pseudo_labels_change_the_gradient() -> None:
    batch = random_batch()
    own, supervised = method(network=Small, num_classes=3), method(Supervised, network=Small, num_classes=3)
    for a, b in zip(gradients(own, batch), gradients(supervised, batch), strict=True):
        assert (a - b).abs().max() > 1e-3


def test_the_order_of_unlabeled_samples_does_not_matter() -> None:
    batch, order = random_batch(), torch.randperm(6)
    other = {"labeled": batch["labeled"], "unlabeled": {k: v[order] for k, v in batch["unlabeled"].items()}}
    own = method(network=Small, num_classes=3)
    torch.testing.assert_close(own.training_step(batch, 0), own.training_step(other, 0))


@pytest.mark.parametrize("mean_over", ["selected", "all"])
def test_two_ranks_equal_one_on_the_joint_batch(on_ranks, mean_over) -> None:
    batch = random_batch()

    def share(rank: int) -> list[Tensor]:
        part = {role: {k: v.chunk(2)[rank] for k, v in values.items()} for role, values in batch.items()}
        return gradients(method(network=Small, num_classes=3, mean_over=mean_over), part)

    joint = gradients(method(network=Small, num_classes=3, mean_over=mean_over), batch)
    for one, other, whole in zip(*on_ranks(share), joint, strict=True):
        torch.testing.assert_close((one + other) / 2, whole)


def test_views_are_those_that_are_read() -> None:
    assert method().unlabeled_views == ("weak",)
    assert method(view="strong").unlabeled_views == ("strong",)
    assert SelfTraining.unlabeled_views != ("strong",)


def test_a_noisy_student_learns_strong_views_of_both() -> None:
    noisy = method(NoisyStudent)
    assert (noisy.unlabeled_views, noisy.labeled_views) == (("strong",), ("strong",))
    strong = (math.log(2) + 0.5 * (9 + math.log1p(math.exp(-9))) + 0.5 * math.log(2)) / 2
    assert noisy.training_step(example(), 0).item() == pytest.approx(strong)  # the labeled one is sure and right


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"unlabeled_weight": -1.0}, "unlabeled_weight=-1.0"),
        ({"view": "image"}, "view='image'"),
        ({"mean_over": "half"}, "mean_over='half'"),
    ],
)
def test_out_of_range(arguments, match) -> None:
    with pytest.raises(UserError, match=match):
        method(**arguments)
