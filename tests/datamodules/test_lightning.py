"""The data modules under a Trainer: resuming, several processes, files of a run."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from datamodules import Blobs, DomainData, SemiSupervisedData, SupervisedData
from zoo.core.errors import UserError


class Recorder(LightningModule):
    """Writes down what it is given; one BatchNorm, whose buffers DDP broadcasts before every forward."""

    def __init__(self, folder=None, pixels=64):
        super().__init__()
        self.folder = folder
        self.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(pixels), torch.nn.Linear(pixels, 3))
        self.seen = {"train": [], "val": [], "test": [], "predict": []}
        self.images = []

    def training_step(self, batch, batch_idx):
        batch = next(iter(batch.values()))
        self.seen["train"].append(batch["index"].tolist())
        self.images.append(batch["image"].clone())
        return torch.nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.layer(batch["image"].flatten(1))
        self.seen["val"].append(batch["index"].tolist())

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.layer(batch["image"].flatten(1))
        self.seen["test"].append(batch["index"].tolist())

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen["predict"].append(batch["index"].tolist())
        return {"index": batch["index"]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def write(self, stage):
        if self.folder is not None:
            (self.folder / f"{stage}-{self.global_rank}.json").write_text(json.dumps(self.seen[stage]))

    def on_train_end(self):
        self.write("train")
        self.write("val")

    def on_test_end(self):
        self.write("test")

    def on_predict_end(self):
        self.write("predict")


def trainer(folder, **arguments):
    return Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 2,
            **arguments,
        }
    )


def recorder(folder=None):
    torch.manual_seed(0)
    return Recorder(folder)


def supervised(**arguments):
    return SupervisedData(
        Blobs(samples=40, test_samples=21), **{"batch_size": 4, "steps": 5, "val_size": 9, **arguments}
    )


def test_an_epoch_is_its_steps(tmp_path):
    model, data = recorder(), supervised(steps=7)
    run = trainer(tmp_path)
    run.fit(model, data)
    assert run.global_step == 14
    assert len(model.seen["train"]) == 14
    assert model.seen["val"] == [data.split["val"].tolist()] * 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [3, 5, 8, 10])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop, workers):
    """In the middle of an epoch (3, 8) and between epochs (5, 10): batches, views and weights."""

    def run(folder, steps, ckpt_path=None):
        save = ModelCheckpoint(folder, filename="at-{step}", every_n_train_steps=stop, save_top_k=-1)
        model = recorder()
        one = trainer(folder, max_epochs=-1, max_steps=steps, callbacks=[save], enable_checkpointing=True)
        one.fit(model, supervised(num_workers=workers), ckpt_path=ckpt_path)
        return model

    whole = run(tmp_path / "whole", 13)
    torch.manual_seed(99)  # resuming does not lean on the global random numbers
    rest = run(tmp_path / "rest", 13, ckpt_path=tmp_path / "whole" / f"at-step={stop}.ckpt")
    assert rest.seen["train"] == whole.seen["train"][stop:]
    assert all(torch.equal(a, b) for a, b in zip(rest.images, whole.images[stop:], strict=True))
    for a, b in zip(rest.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_every_role_resumes(tmp_path):
    def data():
        return SemiSupervisedData(Blobs(samples=60), labels_per_class=3, batch_size=4, unlabeled_ratio=2, steps=6)

    class Both(Recorder):
        def training_step(self, batch, batch_idx):
            self.seen["test"].append(batch["unlabeled"]["index"].tolist())
            self.images.append(batch["unlabeled"]["strong"].clone())
            return super().training_step({"labeled": batch["labeled"]}, batch_idx)

    def run(folder, ckpt_path=None):
        save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        model = Both()
        trainer(folder, callbacks=[save], enable_checkpointing=True).fit(model, data(), ckpt_path=ckpt_path)
        return model

    whole = run(tmp_path / "a")
    rest = run(tmp_path / "b", ckpt_path=tmp_path / "a" / "step=4.ckpt")
    assert rest.seen["train"] == whole.seen["train"][4:]
    assert rest.seen["test"] == whole.seen["test"][4:]
    assert all(torch.equal(a, b) for a, b in zip(rest.images, whole.images[8:], strict=True))


def test_the_split_is_written_beside_the_run(tmp_path):
    data = supervised(labels_per_class=4)
    trainer(tmp_path, max_epochs=1).fit(recorder(), data)
    again = supervised(split=str(tmp_path / "split.json"), seed=5)
    again.setup("fit")
    assert torch.equal(again.split["labeled"], data.split["labeled"])


def test_a_run_without_a_folder_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(None, max_epochs=1).fit(recorder(), supervised(labels_per_class=4))
    assert not list(tmp_path.iterdir())
    trainer(None, max_epochs=1, logger=CSVLogger(".", "", "")).fit(recorder(), supervised(labels_per_class=4))
    assert (tmp_path / "split.json").is_file()  # the current folder is the run's


def test_a_split_of_another_regime_is_named(tmp_path):
    trainer(tmp_path, max_epochs=1).fit(recorder(), supervised(labels_per_class=4))
    with pytest.raises(UserError, match="no part 'unlabeled'; it has labeled, val"):
        SemiSupervisedData(Blobs(samples=40), split=str(tmp_path / "split.json")).setup("fit")


def test_no_validation_is_no_error(tmp_path):
    model = recorder()
    trainer(tmp_path, max_epochs=1).fit(model, supervised(val_size=0))
    assert model.seen["val"] == []


def test_validation_by_name(tmp_path):
    data = DomainData(Blobs(samples=60), Blobs(samples=60, seed=1), batch_size=4, steps=2, val_size=6)
    model = recorder()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, data)
    assert list(run.val_dataloaders) == ["val", "oracle"]
    assert sum(map(len, model.seen["val"])) == 12
    run.test(model, data, verbose=False)
    assert list(run.test_dataloaders) == ["test"]


def test_two_processes_share_out_training_and_evaluation(tmp_path):
    model = recorder(tmp_path)
    data = supervised(steps=3, eval_batch_size=4, val_size=9)  # 31 samples, 24 an epoch; 9 and 21 to evaluate: odd
    run = trainer(tmp_path, strategy="ddp_fork", devices=2)
    run.fit(model, data)
    run.test(model, data, verbose=False)
    run.predict(model, data, return_predictions=False)

    def read(stage):
        return [json.loads((tmp_path / f"{stage}-{rank}.json").read_text()) for rank in range(2)]

    first, second = read("train")
    assert [len(batch) for batch in first + second] == [4] * 12
    alone = recorder()
    trainer(tmp_path / "alone").fit(alone, supervised(steps=3, batch_size=8))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone.seen["train"]
    for epoch in range(2):
        together = [i for rank in (first, second) for batch in rank[3 * epoch : 3 * epoch + 3] for i in batch]
        if epoch == 0:  # the second epoch goes from the first pass into the second
            assert len(set(together)) == 24
    held = json.loads((tmp_path / "split.json").read_text())["parts"]["val"]
    validated = [i for rank in read("val") for batch in rank for i in batch]
    assert sorted(validated) == sorted(held * 2)  # twice: once an epoch, and no sample more
    for stage in ("test", "predict"):
        shares = read(stage)
        assert sorted(i for rank in shares for batch in rank for i in batch) == list(range(21))
        assert len(shares[0]) == len(shares[1])


def test_batches_in_memory_are_drawn_by_whole_lists():
    """One indexing operation per batch, never one per sample."""
    data = supervised(batch_size=16)
    data.setup("fit")
    calls = []
    samples = data.roles["labeled"].samples
    original = samples.images_at
    samples.images_at = lambda where: calls.append(len(where)) or original(where)
    assert len(list(data.train_dataloader())) == 5
    assert calls == [16] * 5


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_images_are_of_the_weights_type(tmp_path, precision, dtype):
    """Normalised images are made behind the place where Lightning converts batches."""
    source = Blobs(num_classes=3, samples=40, test_samples=20, size=8)
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, max_epochs=1, precision=precision,
    )  # fmt: skip
    data = SupervisedData(source, batch_size=4, steps=2, val_size=0.2)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    assert {image.dtype for image in module.images} == {dtype}
    assert module.layer[1].weight.dtype == dtype
