import pytest
import torch

from zoo.core.errors import UserError
from zoo.core.open_set import OpenSetAccuracy


def logits(*said, classes):
    return torch.nn.functional.one_hot(torch.tensor(said), classes) * 9.0


def test_by_hand():
    measure = OpenSetAccuracy(2)
    # class 0: 3 of 4; class 1: 1 of 2; unknown: 1 of 4
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    measure.update(logits(0, 0, 0, 2, 1, 0, 2, 0, 1, 1, classes=3), labels)
    found = {name: value.item() for name, value in measure.compute().items()}
    assert found["accuracy"] == pytest.approx(5 / 10)
    assert found["known_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["unknown_accuracy"] == pytest.approx(1 / 4)
    assert found["hos"] == pytest.approx(2 * 0.625 * 0.25 / 0.875)


def test_batches_add_up_and_unlabelled_samples_do_not_count():
    torch.manual_seed(0)
    outputs, labels = torch.randn(50, 4), torch.randint(-1, 4, (50,))
    whole, parts = OpenSetAccuracy(3), OpenSetAccuracy(3)
    whole.update(outputs[labels >= 0], labels[labels >= 0])
    for part in range(5):
        parts.update(outputs[part::5], labels[part::5])
    assert whole.compute() == parts.compute()


def test_a_threshold_says_unknown_for_networks_that_cannot():
    labels = torch.tensor([0, 1, 2, 2])
    outputs = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.1, 0.0], [0.0, 0.1]])
    without, measure = OpenSetAccuracy(2), OpenSetAccuracy(2, threshold=0.8)
    without.update(outputs, labels)
    measure.update(outputs, labels)
    assert without.compute()["hos"] == 0
    assert measure.compute()["hos"] == 1


def test_classes_without_samples_are_left_out():
    measure = OpenSetAccuracy(3)
    measure.update(logits(0, 3, classes=4), torch.tensor([0, 3]))
    assert measure.compute()["known_accuracy"] == 1
    measure = OpenSetAccuracy(3)
    measure.update(logits(0, 1, classes=3), torch.tensor([0, 2]))
    assert set(measure.compute()) == {"accuracy", "known_accuracy"}  # nothing was unknown


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"threshold=1.5 must be in 0..1"):
        OpenSetAccuracy(3, threshold=1.5)
    with pytest.raises(UserError, match="5 logits for 3 known classes"):
        OpenSetAccuracy(3).update(torch.zeros(2, 5), torch.zeros(2).long())
