import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from callbacks import PredictionWriter
from zoo import ProgrammaticSupervision
from zoo.core.errors import UserError
from zoo.core.label_models import DawidSkene, MajorityVote, TripletMoments, WeightedVote
from zoo.core.method import Method

SAMPLES = 300


def plant(samples: int = SAMPLES, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    right = torch.rand(samples, 5, generator=generator) < torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    others = (labels.unsqueeze(1) + torch.randint(1, 3, (samples, 5), generator=generator)) % 3
    votes = torch.where(right, labels.unsqueeze(1), others)
    return votes.masked_fill(torch.rand(samples, 5, generator=generator) > 0.4, -1), labels


class Table(Dataset):
    def __init__(self, votes: Tensor, labels: Tensor, key: str, nested: bool) -> None:
        self.votes, self.labels, self.key, self.nested = votes, labels, key, nested

    def __len__(self) -> int:
        return len(self.votes)

    def __getitem__(self, i: int) -> Any:
        row = {"votes": self.votes[i], "index": 7 * i, self.key: self.labels[i]}
        return {"votes": row} if self.nested else row


class Votes(LightningDataModule):
    num_classes = 3
    function_names = ("a", "b", "c", "d", "e")
    predicts = "train"

    def __init__(self, size: int = 50, poisoned: bool = False) -> None:
        super().__init__()
        self.size, self.asked = size, False
        self.votes, self.labels = plant()
        self.hidden = torch.zeros_like(self.labels) if poisoned else self.labels

    def labeled_votes(self) -> tuple[Tensor, Tensor]:
        self.asked = True
        return plant(100, 9)

    def train_dataloader(self) -> DataLoader:
        table = Table(self.votes, self.hidden, "hidden_label", True)
        return DataLoader(table, self.size, shuffle=True, generator=torch.Generator().manual_seed(0))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Table(*plant(200, 1), "label", False), batch_size=64)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(Table(self.votes, self.labels, "label", False), batch_size=64)


def trainer(folder: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **{"max_epochs": 1, "devices": 1, **arguments},
    )  # fmt: skip


def method(label_model: Any = DawidSkene) -> ProgrammaticSupervision:
    return ProgrammaticSupervision(label_model=label_model, num_classes=3)


def same(a: Method, b: Method) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_one_pass_fits_the_label_model_to_all_votes(tmp_path) -> None:
    made, data = method(), Votes()
    t = trainer(tmp_path)
    t.fit(made, datamodule=data)
    direct = DawidSkene(3).fit(data.votes)
    assert torch.equal(made.label_model.table, direct.table)
    assert torch.equal(made.label_model.balance, direct.balance)
    assert t.global_step == 6
    assert not data.asked, "true labels are read only where they are asked for"

    votes, labels = plant(200, 1)
    right = (direct.posterior(votes).argmax(1) == labels).float()
    covered = (votes >= 0).any(1)
    found = {name: float(value) for name, value in t.callback_metrics.items()}  # of the validation within the run
    assert found["val/accuracy"] == pytest.approx(float(right.mean()))
    assert found["val/covered_accuracy"] == pytest.approx(float(right[covered].mean()))
    assert found["val/coverage"] == pytest.approx(float(covered.float().mean()))
    area = roc_auc_score(labels, direct.posterior(votes), multi_class="ovr")
    assert found["val/auroc"] == pytest.approx(area, abs=1e-6)
    highest, lowest = votes.amax(1), votes.masked_fill(votes < 0, 3).amin(1)
    assert found["val/conflict"] == pytest.approx(float((highest > lowest).float().mean()))
    majority = MajorityVote(3, balance=direct.balance.tolist()).fit(votes).posterior(votes).argmax(1)
    assert found["val/majority_accuracy"] == pytest.approx(float((majority == labels).float().mean()))


@pytest.mark.filterwarnings("ignore")
def test_samples_without_a_label_count_for_coverage_alone() -> None:
    made = method()
    made.configure_model()
    votes, labels = plant(50, 2)
    made.label_model.fit(votes)
    batch = {"votes": votes, "label": labels.where(torch.arange(50) < 20, torch.tensor(-1))}
    metrics = made.build_metrics()
    made.evaluate(batch, metrics)
    known = made.build_metrics()
    made.evaluate({"votes": votes[:20], "label": labels[:20]}, known)
    found, wanted = metrics.compute(), known.compute()
    for name in ("accuracy", "covered_accuracy", "majority_accuracy", "auroc"):
        assert float(found[name]) == pytest.approx(float(wanted[name]))
    assert float(found["coverage"]) == pytest.approx(float((votes >= 0).any(1).float().mean()))
    metrics.reset()
    made.evaluate(batch | {"label": torch.full((50,), -1)}, metrics)
    assert metrics.compute()["auroc"].isnan()


def test_checkpoint_reloads_and_predictions_carry_weights(tmp_path) -> None:
    made, data = method(partial(TripletMoments, balance=[0.2, 0.3, 0.5])), Votes()
    data.votes[:2] = -1
    t = trainer(tmp_path, PredictionWriter(str(tmp_path)))
    t.fit(made, datamodule=data)
    t.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert "collected" not in torch.load(tmp_path / "last.ckpt", weights_only=True)
    loaded = Method.load_from_checkpoint(tmp_path / "last.ckpt")
    assert same(made, loaded)
    t.predict(loaded, datamodule=data)
    file = load_file(tmp_path / "predictions.safetensors")
    assert file["index"].tolist() == list(range(0, 7 * SAMPLES, 7))
    assert torch.equal(file["weights"], (data.votes >= 0).any(1).float())
    torch.testing.assert_close(file["probabilities"], made.label_model.posterior(data.votes))
    torch.testing.assert_close(file["probabilities"][0], torch.tensor([0.2, 0.3, 0.5]))


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


def test_a_run_that_was_cut_off_goes_on_with_what_it_had_collected(tmp_path) -> None:
    whole, file = method(), tmp_path / "half.ckpt"
    trainer(tmp_path, SaveAt(4, file)).fit(whole, datamodule=Votes())
    assert len(torch.load(file, weights_only=True)["collected"]["index"]) == 200
    rest = method()
    rest.configure_model()
    rest.on_load_checkpoint(torch.load(file, weights_only=True))
    # the loader of this test cannot go on in the middle: the remaining batches by hand
    for batch in list(Votes().train_dataloader())[4:]:
        rest.training_step(batch, 0)
    rest._trainer = trainer(tmp_path)
    rest.refit()
    assert same(whole, rest)


def test_hidden_labels_change_nothing_and_labelled_few_are_read_when_asked_for(tmp_path) -> None:
    clean, poisoned, asking = method(), method(), method(WeightedVote)
    trainer(tmp_path).fit(clean, datamodule=Votes())
    trainer(tmp_path).fit(poisoned, datamodule=Votes(poisoned=True))
    assert same(clean, poisoned)
    data = Votes()
    trainer(tmp_path).fit(asking, datamodule=data)
    assert data.asked
    assert torch.equal(asking.label_model.table, WeightedVote(3).fit(data.votes, labeled=plant(100, 9)).table)


def test_samples_met_twice_count_once(tmp_path) -> None:
    once, twice = method(), method()
    trainer(tmp_path).fit(once, datamodule=Votes())
    data = Votes()
    table = Table(data.votes, data.labels, "hidden_label", True)
    again = DataLoader(table, 64, sampler=[*range(SAMPLES), *range(100)])
    trainer(tmp_path).fit(twice, again)
    assert same(once, twice)


class Ranks(Votes):
    def train_dataloader(self) -> DataLoader:
        table = Table(self.votes, self.labels, "hidden_label", True)
        return DataLoader(table, 40, sampler=DistributedSampler(table, shuffle=False))


class Keep(Callback):
    """What the ranks have, out of the process that ran them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save(copy.deepcopy(pl_module.state_dict()), self.folder / f"{trainer.global_rank}.pt")


def test_two_ranks_fit_what_one_does(tmp_path) -> None:
    one = method()
    trainer(tmp_path).fit(one, datamodule=Votes())
    two = trainer(tmp_path, Keep(tmp_path), SaveAt(2, tmp_path / "half.ckpt"), devices=2, strategy="ddp_fork")
    two.fit(method(), datamodule=Ranks())
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    assert len(torch.load(tmp_path / "half.ckpt", weights_only=True)["collected"]["index"]) == 160


def test_what_a_user_may_get_wrong(tmp_path) -> None:
    with pytest.raises(UserError, match=r"must be a recipe.*not a built DawidSkene"):
        method(DawidSkene(3))
    with pytest.raises(UserError, match="nothing is known of the labelling functions yet"):
        trainer(tmp_path).test(method(), datamodule=Votes(), verbose=False)
    data = Votes()
    data.votes[:, 2] = -1
    with pytest.warns(UserWarning, match=r"always abstaining, and left out: function 2 \('c'\)"):
        trainer(tmp_path).fit(method(), datamodule=data)
    data = Votes()
    data.votes[0, 1] = 3
    with pytest.raises(UserError, match=r"function 1 \('b'\) votes 3; with 3 classes"):
        trainer(tmp_path).fit(method(), datamodule=data)
