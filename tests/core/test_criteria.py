import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from datamodules import Blobs, SupervisedData
from zoo import Supervised
from zoo.core.criteria import (
    CrossEntropy,
    Dice,
    Focal,
    LogitAdjusted,
    SelfAdjustingDice,
    class_counts,
)
from zoo.core.errors import UserError
from zoo.losses import adjust_logits

ALL = [CrossEntropy, LogitAdjusted, Dice, SelfAdjustingDice, Focal]


@pytest.mark.parametrize("criterion", ALL)
def test_hard_and_one_hot_labels_are_the_same(criterion) -> None:
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    loss = criterion(3)(logits, labels)
    assert loss.ndim == 0
    torch.testing.assert_close(loss, criterion(3)(logits, one_hot(labels, 3).float()))


@pytest.mark.parametrize("criterion", ALL)
def test_a_step_against_the_gradient_raises_a_wrong_class(criterion) -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    criterion(3)(logits, torch.tensor([1, 1, 2])).backward()
    assert (logits.grad[:2, 1] < 0).all()


@pytest.mark.parametrize("criterion", ALL)
def test_half_precision_is_left(criterion) -> None:
    logits, labels = torch.randn(8, 4, dtype=torch.bfloat16), torch.arange(8) % 4
    if criterion is not CrossEntropy:
        torch.testing.assert_close(criterion(4)(logits, labels), criterion(4)(logits.float(), labels))


def test_focal_by_hand_and_without_focus() -> None:
    logits, labels = torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log(), torch.tensor([0, 1])
    p = torch.tensor([0.8, 0.5])
    torch.testing.assert_close(Focal(2, gamma=2.0)(logits, labels), (-((1 - p) ** 2) * p.log()).mean())
    torch.testing.assert_close(Focal(2, gamma=0.0)(logits, labels), cross_entropy(logits, labels))
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    Focal(2, gamma=0.5)(sure, torch.tensor([0])).backward()
    assert sure.grad.isfinite().all()


def test_adjusted_logits_by_hand() -> None:
    z = torch.zeros(1, 3)
    adjusted = adjust_logits(z, torch.tensor([6, 3, 0]), tau=1.0)
    torch.testing.assert_close(adjusted.softmax(1), torch.tensor([[0.6, 0.3, 0.1]]))  # none counts as one
    halved = adjust_logits(z[:, :2], torch.tensor([4, 1]), tau=0.5)
    torch.testing.assert_close(halved.softmax(1), torch.tensor([[2 / 3, 1 / 3]]))
    torch.testing.assert_close(
        adjust_logits(adjusted, torch.tensor([6, 3, 0]), tau=-1.0).softmax(1), z.softmax(1)
    )  # taken out again
    with pytest.raises(UserError, match="2 counts do not go with 3 classes"):
        adjust_logits(z, torch.ones(2))


def test_uniform_counts_are_the_cross_entropy() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    criterion = LogitAdjusted(4, tau=2.0)
    torch.testing.assert_close(criterion(logits, labels), cross_entropy(logits, labels))
    criterion.prepare(torch.full((4,), 17))
    torch.testing.assert_close(criterion(logits, labels), cross_entropy(logits, labels))
    criterion.prepare(torch.tensor([8, 4, 2, 1]))
    shifted = logits + 2.0 * torch.tensor([8.0, 4.0, 2.0, 1.0]).log()
    torch.testing.assert_close(criterion(logits, labels), cross_entropy(shifted, labels))


def test_adjustment_makes_the_optimum_balanced() -> None:
    # one feature value, of which class 0 has 9 and class 1 has 1 sample: both are equally likely given their class
    labels = torch.tensor([0] * 9 + [1])
    z = torch.zeros(2, requires_grad=True)
    criterion = LogitAdjusted(2)
    criterion.prepare(torch.bincount(labels))
    criterion(z.expand(10, 2), labels).backward()
    torch.testing.assert_close(z.grad, torch.zeros(2))


def test_counts_come_from_the_data_and_stay_in_the_checkpoint() -> None:
    data = SupervisedData(Blobs(samples=60), labels_per_class=7, batch_size=4, val_size=0)
    data.setup("fit")
    assert class_counts(data, 3).tolist() == [7, 7, 7]
    method = Supervised(network=lambda n: torch.nn.Linear(2, n), num_classes=3, criterion=LogitAdjusted)
    method.configure_model()
    method.criterion.prepare(torch.tensor([5, 3, 1]))
    other = Supervised(network=lambda n: torch.nn.Linear(2, n), num_classes=3, criterion=LogitAdjusted)
    other.configure_model()
    other.load_state_dict(method.state_dict())
    assert other.criterion.counts.tolist() == [5, 3, 1]
    with pytest.raises(UserError, match="4 class counts"):
        other.criterion.prepare(torch.ones(4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogitAdjusted(3, tau=-1.0), "LogitAdjusted: tau=-1"),
        (lambda: LogitAdjusted(3, label_smoothing=1.0), "label_smoothing=1"),
        (lambda: Dice(3, smoothing=0.0), "Dice: smoothing=0"),
        (lambda: SelfAdjustingDice(3, alpha=-1.0), "SelfAdjustingDice: .* alpha=-1"),
        (lambda: Focal(3, gamma=-1.0), "Focal: gamma=-1"),
    ],
)
def test_out_of_range(build, message) -> None:
    with pytest.raises(UserError, match=message):
        build()
