import pytest
import torch

from zoo.core.errors import UserError
from zoo.policies import (
    Balanced,
    ClassAdaptive,
    ConfidenceThreshold,
    Curriculum,
    Debiased,
    MeanVote,
    MostConfident,
    RandomSubset,
    Selection,
    TransductiveBound,
)
from zoo.policies.selection import adjust, balanced_copies, harden, top

ROWS = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])  # confidences 0.9, 0.6, 0.7, 0.8


def predictions(count: int = 200, classes: int = 4) -> torch.Tensor:
    return (2.0 * torch.randn(count, classes)).softmax(1)


@pytest.mark.parametrize(
    ("selection", "weights"),
    [
        (Selection(2), [1, 1, 1, 1]),
        (ConfidenceThreshold(2, 0.0), [1, 1, 1, 1]),
        (ConfidenceThreshold(2, 0.7), [1, 0, 1, 1]),
        (ConfidenceThreshold(2, 1.0), [0, 0, 0, 0]),
        (MeanVote(2), [1, 0, 0, 1]),  # the mean is 0.75
        (MostConfident(2, count=3), [1, 0, 1, 1]),
        (MostConfident(2, count=9), [1, 1, 1, 1]),
        (MostConfident(2, fraction=0.5), [1, 0, 0, 1]),
        (MostConfident(2, fraction=0.24), [0, 0, 0, 0]),
    ],
)
def test_by_hand(selection, weights) -> None:
    targets, found = selection(ROWS)
    assert torch.equal(targets, ROWS)
    assert found.tolist() == weights
    assert found.dtype == ROWS.dtype


def test_selected_sets_are_nested_as_the_threshold_falls() -> None:
    p, before = predictions(), torch.zeros(200)
    for threshold in torch.linspace(1.0, 0.0, 21).tolist():
        _, weights = ConfidenceThreshold(4, threshold)(p)
        assert (weights >= before).all()
        before = weights
    assert before.all()


def test_equal_confidences_are_taken_in_order() -> None:
    assert top(torch.full((5,), 0.5), 2).tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(("step", "count"), [(0.2, 5), (0.2, 7), (0.3, 10), (0.1, 200)])
def test_curriculum_counts(step, count) -> None:
    p = predictions(count)
    order = p.amax(1).argsort(descending=True)
    for number in range(1, 12):
        _, weights = Curriculum(4, step)(p, number)
        expected = min(count, (round(100 * number * step) * count) // 100)
        assert weights.sum() == expected
        assert weights[order[:expected]].all()


def test_curriculum_over_the_rounds_of_a_run() -> None:
    p = predictions(30)
    assert [int(Curriculum(4, None)(p, number, 3)[1].sum()) for number in (1, 2, 3, 4)] == [10, 20, 30, 30]
    with pytest.raises(UserError, match="known length"):
        Curriculum(4, None)(p, 1)


def test_class_adaptive_by_hand() -> None:
    # of 6 samples, 2 are surely of class 0, 1 of class 1, none of class 2: shares over max(2, 6 - 3)
    p = torch.tensor(
        [[0.9, 0.1, 0], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.2, 0.5, 0.3]]
    )
    selection = ClassAdaptive(3, threshold=0.8)
    expected = torch.tensor([0.8 * (2 / 3) / (4 / 3), 0.8 * (1 / 3) / (5 / 3), 0.0])  # 0.4, 0.16, 0
    torch.testing.assert_close(selection.thresholds(p), expected)
    assert selection(p)[1].tolist() == [1] * 6
    assert ClassAdaptive(3, threshold=1.0).thresholds(p).tolist() == [0.0] * 3  # nothing is sure


def test_class_adaptive_equals_one_threshold_where_every_class_is_sure() -> None:
    assert ClassAdaptive(2, 0.5).thresholds(torch.tensor([[0.9, 0.1], [0.1, 0.9]])).tolist() == [0.5, 0.5]


def test_debiased_by_hand_and_in_its_limits() -> None:
    p = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
    torch.testing.assert_close(adjust(p, 1.0), torch.full((2, 2), 0.5))
    torch.testing.assert_close(adjust(p, 0.5)[0], torch.tensor([2 / 3, 1 / 3]))  # square roots of 0.8 and 0.2
    q = predictions()
    torch.testing.assert_close(adjust(q, 0.0), q)
    logits = q.log() - 0.5 * q.mean(0).log()
    torch.testing.assert_close(adjust(q, 0.5), logits.softmax(1))
    targets, weights = Debiased(2, 0.5, select=lambda n: ConfidenceThreshold(n, 0.7))(p)
    torch.testing.assert_close(targets, adjust(p, 0.5))
    assert weights.tolist() == [0, 0]
    assert torch.isfinite(adjust(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 0.5)).all()  # a class that nobody is of


def test_debiased_favours_what_is_predicted_seldom() -> None:
    p = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    targets, _ = Debiased(2, 1.0)(p)
    assert targets.argmax(1).tolist() == [1, 0, 0]


def test_balanced_by_hand() -> None:
    confidence = torch.tensor([0.9, 0.5, 0.8, 0.7, 0.2])
    label = torch.tensor([0, 0, 0, 1, 1])
    copies = balanced_copies(confidence, label, confidence > 0.3, 3, 2)
    assert copies.tolist() == [1, 0, 1, 2, 0]  # two of class 0, one of class 1 twice, none of class 2
    assert balanced_copies(confidence, label, confidence > 0.3, 3, 2, copies=False).tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("count", [1, 7, 40, 300])
def test_balanced_counts_are_exact(count) -> None:
    p = predictions(300, 5)
    p[:, 0] *= 3
    p /= p.sum(1, keepdim=True)
    confidence, label = p.max(1)
    copies = balanced_copies(confidence, label, confidence > 0.3, 5, count, seed=3)
    for each in range(5):
        assert copies[label == each].sum() == count
        own = copies[(label == each) & (confidence > 0.3)]
        if len(own) <= count:
            assert own.max() - own.min() <= 1
        else:
            assert own.max() == 1
    assert not copies[confidence <= 0.3].any()
    _, weights = Balanced(5, count, seed=2)(p, number=1)
    torch.testing.assert_close(weights * copies.max(), copies.float())
    assert 0 <= weights.min() <= weights.max() <= 1
    assert Balanced(5)(p)[1].gt(0).sum() <= 300


def test_a_class_of_one_cannot_outweigh_the_others() -> None:
    p = torch.full((101, 2), 0.1)
    p[:100, 0], p[100, 1] = 0.9, 0.9
    unlimited, limited = Balanced(2, 50)(p)[1], Balanced(2, 50, max_copies=5)(p)[1]
    assert unlimited[100] == 1
    assert unlimited[:100].max() == pytest.approx(1 / 50)
    assert limited[100] == 1
    assert limited[:100].max() == pytest.approx(1 / 5)
    assert limited[:100].gt(0).sum() == 50


def test_random_subsets_differ_between_rounds_and_are_repeatable() -> None:
    p = predictions()
    first, again, second = (RandomSubset(4, fraction=0.25, seed=1)(p, number)[1] for number in (1, 1, 2))
    assert first.sum() == second.sum() == 50
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "selection",
    [
        ConfidenceThreshold(4),
        MeanVote(4),
        ClassAdaptive(4),
        MostConfident(4, count=20),
        Curriculum(4),
        Debiased(4),
        TransductiveBound(4),
    ],
)
def test_permuting_samples_or_classes_permutes_the_selection(selection) -> None:
    p, order, classes = predictions(), torch.randperm(200), torch.randperm(4)
    _, weights = selection(p)
    torch.testing.assert_close(selection(p[order])[1], weights[order])
    torch.testing.assert_close(selection(p[:, classes])[1], weights)
    assert weights.any()


def test_no_samples() -> None:
    empty = torch.zeros(0, 4)
    for selection in (ConfidenceThreshold(4), ClassAdaptive(4), MostConfident(4, count=2), Curriculum(4)):
        assert selection(empty)[1].shape == (0,)


def test_harden() -> None:
    assert harden(ROWS).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert harden(ROWS).dtype == ROWS.dtype


@pytest.mark.parametrize(
    ("kind", "arguments", "match"),
    [
        (ConfidenceThreshold, {"threshold": 1.1}, "threshold=1.1"),
        (ClassAdaptive, {"threshold": 0.0}, "threshold=0.0"),
        (MostConfident, {}, "exactly one"),
        (MostConfident, {"count": 1, "fraction": 0.5}, "exactly one"),
        (MostConfident, {"count": 0}, "count=0"),
        (RandomSubset, {"fraction": 0.0}, "fraction=0.0"),
        (Curriculum, {"step": 0.0}, "step=0.0"),
        (Balanced, {"count": 0}, "count=0"),
        (Balanced, {"threshold": 1.0}, "threshold=1.0"),
        (Balanced, {"max_copies": 0}, "max_copies=0"),
        (Debiased, {"strength": -1.0}, "strength=-1.0"),
        (TransductiveBound, {"grid": 0}, "grid=0"),
    ],
)
def test_out_of_range(kind, arguments, match) -> None:
    with pytest.raises(UserError, match=match):
        kind(3, **arguments)
