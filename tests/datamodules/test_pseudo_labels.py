"""Data modules with the real ``PseudoLabeler``, and a method of a user's own that trains on its labels."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from callbacks import PredictionWriter, PseudoLabeler
from callbacks.pseudo_labeler import read_pseudo_labels
from datamodules import Blobs, SemiSupervisedData, SupervisedData, WeakLabelData
from zoo.core.card import Card
from zoo.core.checkpoint_io import RunCheckpoint
from zoo.core.errors import UserError
from zoo.core.method import Method


class Layer(nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.layer = nn.Linear(64, num_outputs)

    def forward(self, x):
        return self.layer(x.flatten(1))


class Relabeled(Method):
    """Cross-entropy on labels, and on the pseudo-labels of those samples that have one."""

    card = Card(title="Self-training", year=2000, paper="", family="test", roles=("labeled", "unlabeled"))

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.seen = []

    def training_step(self, batch, batch_idx):
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        self.seen.append({key: unlabeled[key].clone() for key in ("index", "pseudo_label", "has_pseudo_label")})
        return self.report(
            supervised=cross_entropy(self.network(labeled["image"]), labeled["label"]),
            unlabeled=cross_entropy(self.network(unlabeled["strong"]), unlabeled["pseudo_label"]),
        )


class Student(Relabeled):
    def training_step(self, batch, batch_idx):
        weak = batch["weak"]
        self.seen.append({key: weak[key].clone() for key in ("index", "pseudo_label", "has_pseudo_label")})
        return self.report(weak=cross_entropy(self.network(weak["image"]), weak["pseudo_label"]))


def method(kind=Relabeled):
    torch.manual_seed(0)
    return kind(network=Layer, num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.1))


def blobs(**arguments):
    settings = {"labels_per_class": 2, "batch_size": 4, "unlabeled_ratio": 2, "steps": 3, "val_size": 9}
    return SemiSupervisedData(Blobs(samples=60), **{**settings, "eval_batch_size": 16, **arguments})


def trainer(folder, *callbacks, **arguments):
    return Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 2,
            **arguments,
        }
    )


def own(model, data):
    """The model's probabilities of the unlabelled samples as they are, without the data module's loaders."""
    samples = data.roles["unlabeled"].samples
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.source.mean, data.source.std))
    with torch.no_grad():
        return samples.ids, model((samples.images / 255 - mean) / std).softmax(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_two_rounds_reach_the_batches(tmp_path, workers):
    model, data = method(), blobs(num_workers=workers, views_in_workers=workers > 0)
    first = own_at_start = None

    class AtStart(PseudoLabeler):
        def relabel(self, trainer, pl_module, epoch=0):
            nonlocal first, own_at_start
            super().relabel(trainer, pl_module, epoch)
            if self.round == 1:
                first, own_at_start = self.probabilities, own(pl_module, trainer.datamodule)

    labeler = AtStart(every_n_epochs=1)
    trainer(tmp_path, labeler).fit(model, data)
    ids, by_start = own_at_start
    assert ids.tolist() == sorted(data.split["unlabeled"].tolist())
    assert torch.allclose(first, by_start, atol=1e-5)  # normalised, without random views
    index, second, number = read_pseudo_labels(tmp_path / "pseudo_labels.safetensors")
    assert number == 3
    assert index.tolist() == ids.tolist()
    assert torch.allclose(second, own(model, data)[1], atol=1e-5)
    assert len(model.seen) == 6
    for batch in model.seen[:3]:
        assert batch["has_pseudo_label"].all()
        assert torch.equal(batch["pseudo_label"], first[torch.searchsorted(ids, batch["index"])])
    row = torch.searchsorted(ids, model.seen[3]["index"])
    assert not torch.allclose(model.seen[3]["pseudo_label"], first[row])  # those of the second round


def test_without_labels_rows_are_zero_and_said_to_be_missing(tmp_path):
    model, data = method(), blobs()
    trainer(tmp_path, PseudoLabeler(at_start=False)).fit(model, data)
    assert [bool(batch["has_pseudo_label"].any()) for batch in model.seen] == [False] * 3 + [True] * 3
    assert not any(batch["pseudo_label"].any() for batch in model.seen[:3])
    known = data.split["unlabeled"][::2]
    data.set_pseudo_labels(known.flip(0), torch.eye(3)[known.flip(0) % 3])
    raw = next(iter(data.train_dataloader()))[0]
    batch = data.on_after_batch_transfer(raw, 0)["unlabeled"]
    has = torch.isin(batch["index"], known)
    assert 0 < has.sum() < len(has)
    assert torch.equal(batch["has_pseudo_label"], has)
    assert torch.equal(batch["pseudo_label"], torch.eye(3)[batch["index"] % 3] * has[:, None])


def test_the_labeller_sees_no_truth(tmp_path):
    data = blobs()
    data.setup("fit")
    batches = list(data.pseudo_label_dataloader())
    assert [set(batch) for batch in batches] == [{"image", "index"}] * len(batches)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == data.split["unlabeled"].tolist()


def test_samples_beside_the_training_set_are_labelled_too():
    class More(Blobs):
        def unlabeled(self):
            return self._draw(7, 3)

    data = SemiSupervisedData(More(samples=60), labels_per_class=2, batch_size=4, unlabeled_ratio=2, val_size=9)
    data.setup("fit")
    index = torch.cat([batch["index"] for batch in data.pseudo_label_dataloader()])
    assert index[-7:].tolist() == list(range(60, 67))
    data.set_pseudo_labels(index, torch.eye(3)[index % 3])
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader()))[0], 0)["unlabeled"]
    assert torch.equal(batch["pseudo_label"], torch.eye(3)[batch["index"] % 3])


@pytest.mark.parametrize(("stop", "by_epoch"), [(4, False), (6, True), (6, False), (8, False)])
def test_a_run_resumed_between_rounds_equals_an_uninterrupted_one(tmp_path, stop, by_epoch):
    """Rounds at the start and after epochs 2 and 4, of 3 steps. At 6, a checkpoint by step comes before the round."""

    def run(folder, ckpt_path=None):
        when = {"every_n_epochs": 2} if by_epoch else {"every_n_train_steps": stop}
        save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=by_epoch, **when)
        model = method()
        trainer(folder, PseudoLabeler(2), save, max_epochs=4).fit(model, blobs(), ckpt_path=ckpt_path)
        return model, read_pseudo_labels(folder / "pseudo_labels.safetensors")

    whole, labels = run(tmp_path / "whole")
    torch.manual_seed(99)
    rest, again = run(tmp_path / "rest", tmp_path / "whole" / f"step={stop}.ckpt")
    assert len(rest.seen) == 12 - stop
    for one, other in zip(rest.seen, whole.seen[stop:], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(rest.network.layer.weight, whole.network.layer.weight)
    assert again[2] == labels[2] == 3
    assert torch.equal(again[1], labels[1])


def test_the_checkpoint_of_every_run_holds_the_labels_of_its_epoch(tmp_path):
    """``last.ckpt`` of a run whose second epoch ended with a round; more epochs see that round's labels."""

    def run(folder, epochs, ckpt_path=None):
        model, labeler = method(), PseudoLabeler(2)
        own = {"max_epochs": epochs, "enable_checkpointing": True}
        trainer(folder, labeler, RunCheckpoint(), **own).fit(model, blobs(), ckpt_path=ckpt_path)
        return model, labeler

    whole, labels = run(tmp_path / "whole", 4)
    run(tmp_path / "half", 2)
    rest, again = run(tmp_path / "rest", 4, next((tmp_path / "half").rglob("last.ckpt")))
    assert again.round == labels.round == 3
    for one, other in zip(rest.seen, whole.seen[6:], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(again.probabilities, labels.probabilities)


def test_two_processes_share_the_labelling(tmp_path):
    class Save(Relabeled):
        def on_train_end(self):
            torch.save([self.seen, self.network.layer.weight], tmp_path / f"{self.global_rank}.pt")

    class Counted(SemiSupervisedData):
        def pseudo_label_dataloader(self):
            loader = super().pseudo_label_dataloader()
            torch.save([batch["index"] for batch in loader], tmp_path / f"share{self.trainer.global_rank}.pt")
            return loader

    settings = {"labels_per_class": 2, "batch_size": 2, "unlabeled_ratio": 2, "steps": 3, "val_size": 9}
    data = Counted(Blobs(samples=60), **settings, eval_batch_size=16)
    trainer(tmp_path, PseudoLabeler(), strategy="ddp_fork", devices=2).fit(method(Save), data)
    one = method()
    alone = blobs()
    trainer(tmp_path / "one", PseudoLabeler()).fit(one, alone)
    shares = [torch.cat(torch.load(tmp_path / f"share{rank}.pt", weights_only=True)) for rank in range(2)]
    assert len(shares[0]) + len(shares[1]) == 51
    assert torch.equal(torch.cat(shares).sort().values, alone.split["unlabeled"])
    (first, weight), (second, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(weight, other)
    for step, expected in enumerate(one.seen[:3]):  # before the first update by other views
        for key in ("index", "pseudo_label"):
            assert torch.allclose(torch.cat([first[step][key], second[step][key]]), expected[key], atol=1e-6)
    later = torch.cat([batch["pseudo_label"] for batch in first[3:] + second[3:]])
    assert torch.allclose(later.sum(1), torch.ones(len(later)))


def test_a_student_may_label_its_half_anew(tmp_path):
    source = Blobs(samples=60)
    file = tmp_path / "weak.safetensors"
    save_file({"index": torch.arange(60), "probabilities": torch.eye(3)[torch.arange(60) % 3].contiguous()}, file)
    data = WeakLabelData(source, role="student", weak_labels=str(file), batch_size=4, steps=2, val_size=9)
    model = method(Student)
    trainer(tmp_path, PseudoLabeler()).fit(model, data)
    assert all(bool(batch["has_pseudo_label"].all()) for batch in model.seen)
    assert read_pseudo_labels(tmp_path / "pseudo_labels.safetensors")[0].tolist() == data.split["student"].tolist()


def test_says_what_is_wrong(tmp_path):
    data = blobs()
    with pytest.raises(RuntimeError, match=r"call setup\('fit'\)"):
        data.pseudo_label_dataloader()
    data.setup("fit")
    with pytest.raises(UserError, match=r"probabilities \(N, 3\), got \(2,\) and \(2, 4\)"):
        data.set_pseudo_labels(torch.arange(2), torch.ones(2, 4))
    with pytest.raises(UserError, match="index -1"):
        data.set_pseudo_labels(torch.tensor([0, -1]), torch.ones(2, 3))
    with pytest.raises(UserError, match="more than once"):
        data.set_pseudo_labels(torch.tensor([1, 1]), torch.ones(2, 3))
    supervisor = WeakLabelData(Blobs(samples=60), batch_size=4, val_size=9)
    with pytest.raises(UserError, match="WeakLabelData: no role of this run is without labels"):
        supervisor.pseudo_label_dataloader()
    with pytest.raises(UserError, match=r"PseudoLabeler: SupervisedData has no pseudo_label_dataloader\(\)"):
        trainer(tmp_path, PseudoLabeler()).fit(method(), SupervisedData(Blobs(samples=60), val_size=9, batch_size=4))


@pytest.mark.parametrize("of", ["test", "folder"])
def test_predictions_of_other_samples_than_those_of_training_are_refused(tmp_path, of):
    model, data = method(), blobs()
    if of == "folder":
        Image.new("L", (8, 8)).save(tmp_path / "a.png")
        data = blobs(predict_folder=str(tmp_path))
    trainer(tmp_path, PredictionWriter()).predict(model, data, return_predictions=False)
    file = str(tmp_path / "predictions.safetensors")
    with pytest.raises(UserError, match="whose numbers are not those of the training samples"):
        blobs(pseudo_labels=file).setup("fit")
    half = WeakLabelData(Blobs(samples=60), batch_size=4, val_size=9)
    trainer(tmp_path, PredictionWriter()).predict(model, half, return_predictions=False)
    blobs(pseudo_labels=file).setup("fit")


class Plain(Relabeled):
    def training_step(self, batch, batch_idx):
        self.seen.append(set(batch["unlabeled"]))
        return self.report(supervised=cross_entropy(self.network(batch["labeled"]["image"]), batch["labeled"]["label"]))


class Reader(Plain):
    reads_pseudo_labels = True


KEYS = {"pseudo_label", "pseudo_label_weight", "has_pseudo_label"}


@pytest.mark.parametrize(
    ("kind", "callbacks", "given", "expected"),
    [
        (Plain, (), False, False),
        (Plain, (), True, True),
        (Plain, (PseudoLabeler(at_start=False),), False, True),
        (Reader, (), False, True),
    ],
)
def test_only_who_gives_or_reads_labels_has_their_keys(tmp_path, kind, callbacks, given, expected):
    model, data = method(kind), blobs()
    if given:
        data.setup("fit")
        data.set_pseudo_labels(torch.arange(2), torch.eye(3)[:2])
    trainer(tmp_path, *callbacks).fit(model, data)
    assert all(keys & KEYS == (KEYS if expected else set()) for keys in model.seen)
    assert all({"weak", "strong", "index"} <= keys for keys in model.seen)
