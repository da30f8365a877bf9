"""Held-out labelled samples of a realistic size, and what a run may not look at to choose its model."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import Blobs, Phrases, SemiSupervisedData, SupervisedData
from datamodules.splits import Split
from zoo.core.errors import UserError


def split_of(kind=SemiSupervisedData, classes=10, samples=300, **arguments):
    source = Blobs(num_classes=classes, samples=samples, size=4)
    data = kind(source, **{"batch_size": 2, "steps": 2, "val_size": 20, **arguments})
    data.setup("fit")
    labels = source.train().labels
    return data, {name: torch.bincount(labels[part], minlength=classes) for name, part in data.split.parts.items()}


@pytest.mark.parametrize("size", [1, 4, 10, 23, 40, 0.1])
def test_a_small_validation_set_is_stratified(size):
    _, per_class = split_of(labels_per_class=4, val_size=size)
    total = size if isinstance(size, int) else round(size * 300)
    assert per_class["val"].sum() == total
    assert per_class["val"].max() - per_class["val"].min() <= 1


def test_labels_that_the_number_of_classes_does_not_divide():
    _, per_class = split_of(num_labels=42)
    assert per_class["labeled"].sum() == 42
    assert sorted(per_class["labeled"].tolist()) == [4] * 8 + [5] * 2
    others = [split_of(num_labels=42, seed=seed)[1]["labeled"].tolist() for seed in range(4)]
    assert len({tuple(counted) for counted in others}) > 1  # which classes get one more is drawn


@pytest.mark.parametrize("kind", [SupervisedData, SemiSupervisedData])
def test_every_class_needs_a_label(kind):
    with pytest.raises(ValueError, match=r"num_labels=9 must be at least 10, one for each class"):
        split_of(kind, num_labels=9)
    split_of(kind, num_labels=10)


class OneMissing(Blobs):
    """A class that is named and never occurs."""

    def train(self):
        samples = super().train()
        return samples.subset((samples.labels != 2).nonzero().flatten())


@pytest.mark.parametrize("kind", [SupervisedData, SemiSupervisedData])
def test_a_class_without_a_sample_is_refused(kind):
    with pytest.raises(ValueError, match=r"1 of 3 classes have no labelled sample: 2 \(blob 2\)"):
        kind(OneMissing(), batch_size=4, val_size=6).setup("fit")
    with pytest.raises(ValueError, match=r"labels_per_class=4, but class 2 \(blob 2\) has only 0 samples"):
        kind(OneMissing(), labels_per_class=4, batch_size=4, val_size=6).setup("fit")


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {"labels_per_class": 3},
        {"num_labels": 42},
        {"labeled_fraction": 0.2},
        {"labels_per_class": 9, "imbalance": 5.0, "unlabeled_imbalance": 2.0},
        {"labels_per_class": 9, "imbalance": 5.0, "balance_labels": True},
    ],
    ids=str,
)
def test_a_split_is_written_and_used_again(tmp_path, include, how):
    data, _ = split_of(include_labeled=include, **how)
    labeled, unlabeled, val = (set(data.split[part].tolist()) for part in ("labeled", "unlabeled", "val"))
    assert len(val) == 20
    assert not val & (labeled | unlabeled)
    assert labeled <= unlabeled if include else not labeled & unlabeled
    path = str(data.split.save(tmp_path / "split.json"))
    again, _ = split_of(include_labeled=include, **how, seed=7, split=path)
    for part in ("labeled", "unlabeled", "val"):
        assert torch.equal(again.split[part], data.split[part])
        assert torch.equal(Split.load(path)[part], data.split[part])
    for role in ("labeled", "unlabeled"):
        assert torch.equal(again.roles[role].samples.ids, data.roles[role].samples.ids)


def closed(source):
    """The source, whose test set nobody may open."""

    def test():
        raise AssertionError("the test set was opened")

    source.test = test
    return source


class Network(LightningModule):
    """Watches what it is validated on."""

    def __init__(self, inputs):
        super().__init__()
        self.layer = torch.nn.Linear(inputs, 3)
        self.seen = []

    def logits(self, x):
        return self.layer(x.flatten(1).float())

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.logits(batch["labeled"]["image"]), batch["labeled"]["label"])

    def validation_step(self, batch, batch_idx):
        self.seen += batch["index"].tolist()
        self.log("val/accuracy", (self.logits(batch["image"]).argmax(1) == batch["label"]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("make", [lambda: Blobs(), lambda: Phrases()])
def test_a_model_is_chosen_without_the_test_set(tmp_path, make):
    source = closed(make())
    data = SemiSupervisedData(source, labels_per_class=4, batch_size=4, unlabeled_ratio=2, steps=3, val_size=12)
    model = Network(64 if isinstance(source, Blobs) else 16)
    best = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max")
    run = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=2, logger=False, callbacks=[best],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(model, data)
    assert best.best_model_path
    assert set(model.seen) == set(data.split["val"].tolist())


def test_nothing_left_without_labels_is_said():
    with pytest.raises(ValueError, match="no samples are left for the role 'unlabeled'"):
        split_of(include_labeled=False)


def test_a_split_and_a_count_that_contradict_it(tmp_path):
    first = SemiSupervisedData(Blobs(num_classes=3, samples=60), labels_per_class=2, batch_size=4, val_size=0)
    first.setup("fit")
    path = str(first.split.save(tmp_path / "split.json"))
    with pytest.raises(UserError, match="has 6 labelled samples, but labels_per_class=5 asks for 15"):
        SemiSupervisedData(Blobs(num_classes=3, samples=60), labels_per_class=5, batch_size=4, split=path).setup("fit")
    SemiSupervisedData(Blobs(num_classes=3, samples=60), num_labels=6, batch_size=4, split=path).setup("fit")
