import json

import pytest
import torch

from datamodules.splits import Split, counts, generator, labeled_per_class, proportional, spread, stratified

LABELS = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)


def test_counts_pass_over_unlabelled_samples():
    assert counts(torch.tensor([0, 2, 2, -1]), 3).tolist() == [1, 0, 2]


def test_counts_name_unknown_classes():
    with pytest.raises(ValueError, match=r"unknown class ids -2, 3; with num_classes=3 they are 0\.\.2"):
        counts(torch.tensor([0, 3, -2]), 3)


def test_stratified_draws_without_replacement():
    drawn = stratified(LABELS, torch.tensor([2, 3, 1]), generator(0))
    assert len(drawn.unique()) == 6
    assert counts(LABELS[drawn], 3).tolist() == [2, 3, 1]
    assert torch.equal(drawn, drawn.sort().values)


def test_stratified_draws_differ_by_seed_and_ignore_the_global_one():
    labels = torch.zeros(100, dtype=torch.int64)
    torch.manual_seed(1)
    first = stratified(labels, torch.tensor([5]), generator(7))
    torch.manual_seed(2)
    assert torch.equal(first, stratified(labels, torch.tensor([5]), generator(7)))
    assert not torch.equal(first, stratified(labels, torch.tensor([5]), generator(8)))


def test_stratified_draws_every_sample_equally_often():
    labels = torch.zeros(4, dtype=torch.int64)
    times = torch.zeros(4)
    for seed in range(400):
        times[stratified(labels, torch.tensor([1]), generator(seed))] += 1
    assert times.min() > 70  # 100 expected, standard deviation 8.7
    assert times.max() < 130


def test_spread_gives_the_remainder_to_random_classes():
    per_class = [tuple(spread(7, 3, generator(seed)).tolist()) for seed in range(20)]
    assert all(sorted(one) == [2, 2, 3] for one in per_class)
    assert len(set(per_class)) == 3
    assert sum(spread(2, 5, generator(0)).tolist()) == 2


def test_proportional_shares_by_largest_remainder():
    assert proportional(torch.tensor([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert proportional(torch.tensor([1, 1, 1]), 2).tolist() == [1, 1, 0]
    assert proportional(torch.tensor([0, 0]), 3).tolist() == [0, 0]


def test_number_of_labels():
    available = counts(LABELS, 3)
    assert labeled_per_class(available, 3, 0) is None
    assert labeled_per_class(available, 3, 0, labels_per_class=2).tolist() == [2, 2, 2]
    assert int(labeled_per_class(available, 3, 0, num_labels=5).sum()) == 5
    assert labeled_per_class(available, 3, 0, labeled_fraction=0.4).tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels_per_class": 3}, r"Data: labels_per_class=3, but class 2 \(c\) has only 2 samples"),
        ({"num_labels": 9}, r"Data: num_labels=9, but class 2 \(c\) has only 2 samples"),
        ({"labels_per_class": 0}, "labels_per_class=0 must be at least 1"),
        ({"num_labels": 0}, "num_labels=0 must be at least 1"),
        ({"labeled_fraction": 1.5}, r"labeled_fraction=1.5 must be in \(0, 1\]"),
        ({"num_labels": 4, "labels_per_class": 2}, "give one of labels_per_class=2 and num_labels=4, not both"),
    ],
)
def test_numbers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        labeled_per_class(counts(LABELS, 3), 3, 0, owner="Data", classes="abc", **arguments)


def test_written_and_read_again(tmp_path):
    split = Split(
        {"labeled": torch.tensor([1, 4]), "val": torch.tensor([], dtype=torch.int64)}, 10, 3, "Blobs", {"a": "b"}
    )
    again = Split.load(split.save(tmp_path / "deep" / "split.json"))
    assert {name: part.tolist() for name, part in again.parts.items()} == {"labeled": [1, 4], "val": []}
    assert (again.size, again.seed, again.source, again.note) == (10, 3, "Blobs", {"a": "b"})
    assert again["val"].dtype == torch.int64
    with pytest.raises(ValueError, match="no part 'train'; it has labeled, val"):
        again["train"]


def test_reading_what_is_no_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Split.load(tmp_path / "none.json")
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    with pytest.raises(ValueError, match="not a split file"):
        Split.load(bad)
    bad.write_text(json.dumps({"size": 3, "parts": {"labeled": [3]}}))
    with pytest.raises(ValueError, match=r"part 'labeled' names samples outside 0\.\.2"):
        Split.load(bad)
