import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zoo import FixMatch, Supervised
from zoo.core.errors import UserError
from zoo.policies import Threshold


class Given(nn.Module):
    """Logits are the input itself, times one weight, so that a batch spells out the predictions."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def fixmatch(**arguments) -> FixMatch:
    arguments = {"policy": partial(Threshold, threshold=0.9), **arguments}
    method = FixMatch(network=Given, num_classes=2, **arguments)
    method.configure_model()
    return method


def batch(x: list, weak: list, strong: list) -> dict[str, dict[str, Tensor]]:
    return {
        "labeled": {"image": torch.tensor(x), "label": torch.zeros(len(x), dtype=torch.long)},
        "unlabeled": {"weak": torch.tensor(weak), "strong": torch.tensor(strong, requires_grad=True)},
    }


EXAMPLE = ([[0.0, 0.0]], [[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [9.0, 0.0]])


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_loss_is_equations_3_and_4(forward_pass) -> None:
    # weak views: 0.98 sure of class 0 (kept) and 0.5 (left out); the mean runs over both
    loss = fixmatch(unlabeled_weight=0.5, forward_pass=forward_pass).training_step(batch(*EXAMPLE), 0)
    assert loss.item() == pytest.approx(math.log(2) + 0.5 * (math.log(2) + 0) / 2)


def test_labels_come_from_the_weak_view() -> None:
    # weak says class 1 surely, strong says class 0 surely: the loss is the strong view's surprise
    loss = fixmatch().training_step(batch([[0.0, 0.0]], [[0.0, 5.0]], [[5.0, 0.0]]), 0)
    assert loss.item() == pytest.approx(math.log(2) + math.log(1 + math.exp(5.0)), rel=1e-6)


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_nothing_flows_through_left_out_or_weak_views(forward_pass) -> None:
    b = batch(*EXAMPLE)
    b["unlabeled"]["weak"].requires_grad_()
    fixmatch(forward_pass=forward_pass).training_step(b, 0).backward()
    assert b["unlabeled"]["strong"].grad[0].abs().sum() > 0
    assert not b["unlabeled"]["strong"].grad[1].any()
    weak_gradient = b["unlabeled"]["weak"].grad
    assert weak_gradient is None or not weak_gradient.any()


def test_the_gradient_raises_the_strong_views_pseudo_label() -> None:
    b = batch(*EXAMPLE)
    fixmatch().training_step(b, 0).backward()
    gradient = b["unlabeled"]["strong"].grad[0]
    assert gradient[0] < 0 < gradient[1]


def test_weight_zero_is_the_supervised_baseline_bit_for_bit() -> None:
    b = batch([[1.0, -2.0], [0.3, 0.1]], *EXAMPLE[1:])
    supervised = Supervised(network=Given, num_classes=2)
    supervised.configure_model()
    method = fixmatch(unlabeled_weight=0.0, forward_pass="split")
    losses = [m.training_step(b, 0) for m in (method, supervised)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(method.network.scale.grad, supervised.network.scale.grad)


def test_the_average_is_evaluated_and_the_student_trains() -> None:
    method = fixmatch()
    method.network.scale.data.fill_(7.0)
    x = torch.randn(2, 2)
    assert torch.equal(method(x), x)
    assert [p for group in method.parameter_groups() for p in group["params"]] == [method.network.scale]


def test_the_baseline_has_the_same_recipes() -> None:
    method = fixmatch(momentum=0.5)
    baseline = method.baseline()
    assert isinstance(baseline, Supervised)
    assert (baseline.network_recipe, baseline.momentum) == (method.network_recipe, 0.5)


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_views_are_those_of_their_images_and_the_weak_one_has_no_gradient(forward_pass) -> None:
    labeled, weak, strong = torch.randn(2, 2), torch.randn(3, 2), torch.randn(3, 2)
    logits = fixmatch(forward_pass=forward_pass).views(labeled, weak, strong)
    assert [torch.equal(a, b) for a, b in zip(logits, (labeled, weak, strong), strict=True)] == [True] * 3
    assert [z.requires_grad for z in logits] == [True, False, True]


def test_the_average_labels_where_it_is_asked_to() -> None:
    # the student's weak view says class 1; the average, whose weight is -1, says class 0, which the strong view doubts
    b = batch([[0.0, 0.0]], [[0.0, 5.0]], [[0.0, 5.0]])
    student, teacher = fixmatch(), fixmatch(labeler="teacher")
    for method in (student, teacher):
        method.teacher.module.scale.data.fill_(-1.0)
    sure, doubt = math.log(1 + math.exp(-5.0)), math.log(1 + math.exp(5.0))
    assert student.training_step(b, 0).item() == pytest.approx(math.log(2) + sure, rel=1e-5)
    assert teacher.training_step(b, 0).item() == pytest.approx(math.log(2) + doubt, rel=1e-5)


def test_the_averages_labels_carry_no_gradient_and_equal_the_students_at_the_start() -> None:
    b = batch(*EXAMPLE)
    b["unlabeled"]["weak"].requires_grad_()
    method = fixmatch(labeler="teacher")
    loss = method.training_step(b, 0)
    loss.backward()
    assert b["unlabeled"]["weak"].grad is None
    assert torch.equal(loss, fixmatch(forward_pass="split").training_step(batch(*EXAMPLE), 0))


class OwnStep(FixMatch):
    def training_step(self, batch, batch_idx) -> Tensor:
        return self.report(nothing=torch.zeros(()))


def test_a_labeler_that_nothing_would_ask_is_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'teacher'"):
        fixmatch(labeler="techer")
    with pytest.raises(UserError, match="FixMatch's own step"):
        OwnStep(network=Given, num_classes=2, labeler="teacher")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unlabeled_weight": -1.0}, "FixMatch: unlabeled_weight=-1.0 must not be negative"),
        ({"momentum": 1.5}, "FixMatch: momentum=1.5 must lie"),
        ({"forward_pass": "splt"}, "must be 'joint' or 'split'. Did you mean 'split'"),
    ],
)
def test_out_of_range(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        FixMatch(network=Given, num_classes=2, **arguments)
