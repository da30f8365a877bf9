import pytest
import torch
from safetensors.torch import save_file

from datamodules import SupervisedData
from datamodules.sources import ArraySource, MissingData, NoisyLabels, SubPseudoLabels
from datamodules.sources.noisy import flipped
from datamodules.sources.sub_pseudo_labels import sub_pseudo_labels
from zoo.core.errors import UserError

WEAK = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
TEACHER = torch.tensor([0, 0, 1, 2, 1, 0, 0, 2, 0, 0, 0, 1])


def test_every_pair_that_occurs_is_a_class():
    labels, pairs = sub_pseudo_labels(WEAK, TEACHER, 3)
    assert pairs == [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert [pairs[label] for label in labels] == list(zip(WEAK.tolist(), TEACHER.tolist(), strict=True))


def test_the_most_frequent_pairs_are_kept_and_the_rest_goes_to_backups():
    labels, pairs = sub_pseudo_labels(WEAK, TEACHER, 3, keep=2)
    assert pairs == [(0, 0), (1, 1), (2, 2), (1, 0), (2, 0), (0, -1), (2, -1)]
    assert len(labels) == len(WEAK)
    for label, w, t in zip(labels.tolist(), WEAK.tolist(), TEACHER.tolist(), strict=True):
        assert pairs[label] in ((w, t), (w, -1))
    without, pairs = sub_pseudo_labels(WEAK, TEACHER, 3, keep=2, backup=False)
    assert len(pairs) == 5
    assert int((without < 0).sum()) == 3


def test_a_perfect_teacher_leaves_the_plain_classes():
    labels, pairs = sub_pseudo_labels(WEAK, WEAK, 3)
    assert torch.equal(labels, WEAK)
    assert pairs == [(0, 0), (1, 1), (2, 2)]


def test_samples_without_teacher_or_label_have_none_and_empty_classes_do_not_exist():
    labels, pairs = sub_pseudo_labels(torch.tensor([0, 2, -1, 2]), torch.tensor([0, -1, 1, 2]), 4)
    assert labels.tolist() == [0, -1, -1, 1]
    assert pairs == [(0, 0), (2, 2)]


def test_as_a_source(tmp_path):
    images = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
    plain = ArraySource(
        3, images=images, labels=WEAK, test_images=images[:3], test_labels=torch.tensor([0, 1, 2]), size=8
    )
    file = tmp_path / "teacher.safetensors"
    order = torch.randperm(12)[:11]
    save_file({"index": order, "probabilities": torch.eye(3)[TEACHER[order]]}, file)
    source = SubPseudoLabels(plain, str(file), keep=1)
    assert source.classes[:3] == ("0", "1", "2")
    assert all("(" in name for name in source.classes[3:])
    assert source.train().labels.max() == source.num_classes - 1
    assert int((source.train().labels < 0).sum()) == 1
    assert source.test().labels.tolist() == [0, 1, 2]
    data = SupervisedData(source, batch_size=2, val_size=0)
    data.setup("fit")
    assert len(data.roles["labeled"].samples) == 11
    assert source.unlabeled() is None
    plain.unlabeled = plain.test  # its classes are no pairs
    assert source.unlabeled().labels.tolist() == [-1, -1, -1]
    with pytest.raises(MissingData, match="PseudoLabeler"):
        SubPseudoLabels(plain, str(tmp_path / "none.safetensors")).prepare()
    with pytest.raises(UserError, match="keep=-1"):
        SubPseudoLabels(plain, str(file), keep=-1)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_noise_has_its_rate_and_kind(kind):
    labels = torch.arange(5).repeat(4000)
    noisy = flipped(labels, 5, 0.4, kind, seed=0)
    assert float((noisy != labels).float().mean()) == pytest.approx(0.4, abs=0.01)
    step = ((noisy - labels) % 5)[noisy != labels]
    shares = torch.bincount(step, minlength=5) / len(step)
    expected = [0, 1, 0, 0, 0] if kind == "asymmetric" else [0, 0.25, 0.25, 0.25, 0.25]
    assert shares.tolist() == pytest.approx(expected, abs=0.02)
    assert torch.equal(noisy, flipped(labels, 5, 0.4, kind, seed=0))
    assert not torch.equal(noisy, flipped(labels, 5, 0.4, kind, seed=1))
    assert torch.equal(flipped(torch.full((9,), -1), 5, 1.0, kind, 0), torch.full((9,), -1))


def test_noise_spares_the_test_labels():
    images = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(10) % 5
    source = ArraySource(5, images=images, labels=labels, test_images=images, test_labels=labels, size=8)
    noisy = NoisyLabels(source, rate=1.0)
    assert torch.equal(noisy.train().labels, (labels + 1) % 5)
    assert torch.equal(noisy.test().labels, labels)
    assert torch.equal(source.train().labels, labels), "the source keeps its own"
    with pytest.raises(UserError, match=r"rate=1\.5"):
        NoisyLabels(source, rate=1.5)
