import pytest
import torch

from datamodules import Blobs, SemiSupervisedData, SupervisedData
from datamodules.splits import balanced, long_tail, long_tailed
from zoo.core.errors import UserError


def per_class(data, part: str) -> list[int]:
    labels = data.source.train().labels[data.split[part]]
    return torch.bincount(labels, minlength=data.num_classes).tolist()


def made(cls=SemiSupervisedData, samples: int = 1000, classes: int = 5, **arguments):
    arguments = {"batch_size": 4, "val_size": 100, "allow_repeats": True, **arguments}
    data = cls(Blobs(num_classes=classes, samples=samples, size=4), **arguments)
    data.setup("fit")
    return data


def test_published_numbers() -> None:
    # CIFAR-10-LT as DARP and CReST have it: 1,500 labels of class 0, ratio 100
    assert long_tail(1500, 10, 100).tolist() == [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]
    assert long_tail(1500, 10, -100).tolist() == [15, 25, 41, 69, 116, 193, 323, 539, 899, 1500]
    assert long_tail(40, 3, 1).tolist() == [40, 40, 40]
    assert long_tail(3, 3, 100).tolist() == [3, 1, 1]
    assert long_tail(7, 1, 10).tolist() == [7]


def test_the_longest_tail_that_fits() -> None:
    assert long_tailed(torch.tensor([100, 100, 100]), 4).tolist() == [100, 50, 25]
    assert long_tailed(torch.tensor([100, 30, 100]), 4).tolist() == [61, 30, 15]  # class 1 allows no more
    assert long_tailed(torch.tensor([100, 100, 100]), -4).tolist() == [25, 50, 100]
    with pytest.raises(UserError, match="unlabeled_imbalance=4, but class 1 has no samples left"):
        long_tailed(torch.tensor([3, 0, 3]), 4)


@pytest.mark.parametrize("cls", [SemiSupervisedData, SupervisedData])
def test_labeled_counts_are_exact_and_validation_stays_balanced(cls) -> None:
    data = made(cls, labels_per_class=81, imbalance=81)
    assert per_class(data, "labeled") == [81, 27, 9, 3, 1]
    assert per_class(data, "val") == [20] * 5
    assert per_class(made(cls, labels_per_class=81, imbalance=-81), "labeled") == [1, 3, 9, 27, 81]
    assert per_class(made(cls, labeled_fraction=0.5, imbalance=10), "labeled") == [90, 50, 28, 16, 9]


def test_the_total_may_be_given() -> None:
    counted = per_class(made(num_labels=60, imbalance=10), "labeled")
    assert sum(counted) == 60
    assert counted == sorted(counted, reverse=True)
    assert min(counted) >= 1
    assert counted[0] / counted[-1] == pytest.approx(10, rel=0.35)
    assert per_class(made(num_labels=5, imbalance=100), "labeled") == [1] * 5
    with pytest.raises(UserError, match="num_labels=4 must be at least 5"):
        made(num_labels=4, imbalance=2)


def test_all_labels_with_a_tail() -> None:
    assert per_class(made(SupervisedData, imbalance=16), "labeled") == [180, 90, 45, 22, 11]


@pytest.mark.parametrize("include", [True, False])
def test_unlabeled_counts_are_exact_beside_the_labeled_ones(include) -> None:
    data = made(labels_per_class=20, imbalance=4, unlabeled_imbalance=-16, include_labeled=include)
    labeled = per_class(data, "labeled")
    assert labeled == [20, 14, 10, 7, 5]
    # class 4 has 180 - 5 samples left
    tail = [10, 21, 43, 87, 175]
    expected = [a + b for a, b in zip(tail, labeled, strict=True)] if include else tail
    assert per_class(data, "unlabeled") == expected
    overlap = torch.isin(data.split["unlabeled"], data.split["labeled"]).sum()
    assert overlap == (len(data.split["labeled"]) if include else 0)
    assert not torch.isin(data.split["val"], data.split["unlabeled"]).any()


def test_without_imbalance_nothing_changes_and_the_tail_is_a_part_of_it() -> None:
    plain, tailed = made(labels_per_class=20), made(labels_per_class=20, imbalance=10)
    assert torch.isin(tailed.split["labeled"], plain.split["labeled"]).all()
    assert torch.equal(plain.split["val"], tailed.split["val"])
    assert len(plain.split["unlabeled"]) == 900


def test_both_regimes_have_the_same_labels() -> None:
    few, semi = (made(cls, labels_per_class=30, imbalance=10) for cls in (SupervisedData, SemiSupervisedData))
    assert torch.equal(few.split["labeled"], semi.split["labeled"])


@pytest.mark.parametrize("arguments", [{"imbalance": 0.5}, {"unlabeled_imbalance": 0.0}, {"imbalance": -0.1}])
def test_a_ratio_below_one_is_refused(arguments) -> None:
    (name,) = arguments
    with pytest.raises(UserError, match=f"SemiSupervisedData: {name}=.* at least 1, or at most -1"):
        made(labels_per_class=4, **arguments)


def test_repeated_labels_are_balanced() -> None:
    labels = torch.tensor([0] * 8 + [1] * 3)
    repeated = balanced(labels, torch.arange(11))
    assert torch.bincount(repeated).tolist() == [1] * 8 + [3, 3, 2]
    assert balanced(labels, torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("cls", [SemiSupervisedData, SupervisedData])
def test_balanced_labels_are_drawn_equally_often(cls) -> None:
    data = made(cls, labels_per_class=27, imbalance=27, classes=4, balance_labels=True)
    assert per_class(data, "labeled") == [27, 9, 3, 1]  # the split itself has every sample once
    role = data.roles["labeled"].samples
    assert torch.bincount(role.labels).tolist() == [27] * 4
    assert set(role.ids.tolist()) == set(data.split["labeled"].tolist())
