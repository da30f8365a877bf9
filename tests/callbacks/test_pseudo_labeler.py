import math

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import EMATeacher, PseudoLabeler
from callbacks.pseudo_labeler import read_pseudo_labels
from zoo.core.errors import UserError


class Rounds(Callback):
    def __init__(self, data) -> None:
        self.data, self.at = data, []

    def on_train_batch_start(self, trainer, *_) -> None:
        self.at.append(len(self.data.given))


def probabilities(model, data):
    model.eval()
    with torch.no_grad():
        return model(data.points.tensors[0]).softmax(1)


def test_labels_at_the_start_and_after_every_n_epochs(method, points, trainer, tmp_path) -> None:
    model, data, labeler = method("averaged"), points(), PseudoLabeler(every_n_epochs=2)
    seen = Rounds(data)
    trainer(EMATeacher(), labeler, seen, max_epochs=5).fit(model, data)
    assert seen.at == [1] * 12 + [2] * 12 + [3] * 6  # 6 batches an epoch
    assert labeler.round == 3
    index, last = data.given[-1]
    assert index.tolist() == list(range(100, 124))
    number = read_pseudo_labels(tmp_path / "pseudo_labels.safetensors")
    assert number[2] == 3
    assert torch.equal(number[0], index)
    assert torch.equal(number[1], last)
    assert last.dtype == torch.float32
    assert index.dtype == torch.int64


def test_labels_are_the_predictors_own(method, points, trainer) -> None:
    model, data = method("averaged"), points()
    trainer(EMATeacher(), PseudoLabeler()).fit(model, data)
    assert torch.allclose(data.given[-1][1], probabilities(model, data))


def test_training_is_not_disturbed(method, points, trainer) -> None:
    class Noise(Callback):
        def __init__(self) -> None:
            self.drawn, self.modes = [], []

        def on_train_batch_start(self, trainer, pl_module, *_) -> None:
            self.drawn.append(torch.rand(()).item())
            self.modes.append((pl_module.network.training, pl_module.teacher.module.training, trainer.training))

    models, noises = [method("averaged"), method("averaged")], [Noise(), Noise()]
    for model, noise, extra in zip(models, noises, ([], [PseudoLabeler()]), strict=True):
        torch.manual_seed(1)
        trainer(EMATeacher(), noise, *extra, max_epochs=3).fit(model, points())
    assert noises[0].drawn == noises[1].drawn
    assert set(noises[1].modes) == {(True, False, True)}
    assert torch.equal(models[0].network.layer.weight, models[1].network.layer.weight)


def test_the_data_module_sees_the_predicting_stage(method, points, trainer) -> None:
    stages = []

    class Data(points):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            stages.append((self.trainer.predicting, "image" in batch))
            return batch

    data = Data()
    trainer(PseudoLabeler(every_n_epochs=0), limit_val_batches=0).fit(method(), data)
    assert set(stages) == {(True, True), (False, False)}


def test_resumes_with_the_labels_of_the_uninterrupted_run(method, points, trainer, tmp_path) -> None:
    whole = points()
    trainer(PseudoLabeler(), max_epochs=3).fit(method(), whole)
    first, labeler = trainer(PseudoLabeler(), max_epochs=2), PseudoLabeler()
    first.fit(method(), points())
    first.save_checkpoint(tmp_path / "two.ckpt")
    data = points()
    trainer(labeler, max_epochs=3).fit(method(), data, ckpt_path=tmp_path / "two.ckpt")
    # the checkpoint's round is given again, then epoch 3's is made
    assert [torch.equal(a, b) for (_, a), (_, b) in zip(whole.given[2:], data.given, strict=True)] == [True, True]
    assert labeler.round == 4


def test_a_checkpoint_without_labels_gets_them_at_the_start(method, points, trainer, tmp_path) -> None:
    first = trainer(max_epochs=1)
    first.fit(method(), points())
    first.save_checkpoint(tmp_path / "one.ckpt")
    for every, expected in ((0, 1), (1, 2)):  # the round of the first epoch was due, and then the second's
        data, labeler = points(), PseudoLabeler(every_n_epochs=every)
        trainer(labeler, seen := Rounds(data), max_epochs=2).fit(method(), data, ckpt_path=tmp_path / "one.ckpt")
        assert set(seen.at) == {1}
        assert labeler.round == expected


def test_an_epoch_cut_short_makes_no_round(method, points, trainer) -> None:
    labeler = PseudoLabeler(at_start=False)
    trainer(labeler, max_epochs=-1, max_steps=9).fit(method(), points())
    assert labeler.round == 1


@pytest.mark.parametrize("count", [24, 20, 3])
def test_two_processes_share_the_set_out(method, points, trainer, tmp_path, two_ranks, count) -> None:
    class Save(Callback):
        def on_fit_end(self, trainer, pl_module) -> None:
            torch.save(trainer.datamodule.given, tmp_path / f"{trainer.global_rank}.pt")

    class Counted(points):
        def pseudo_label_dataloader(self):
            loader = super().pseudo_label_dataloader()
            inner = loader.collate_fn
            object.__setattr__(loader, "collate_fn", lambda rows: self.count(inner(rows)))
            return loader

        def count(self, batch):
            with open(tmp_path / f"read{self.trainer.global_rank}", "a") as file:
                file.write(f"{len(batch['index'])}\n")
            return batch

    one = points(count)
    trainer(PseudoLabeler(every_n_epochs=0)).fit(method(), one)
    trainer(PseudoLabeler(every_n_epochs=0), Save(), **two_ranks).fit(method(), Counted(count))
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for (index, rows), (other, others) in zip(a, b, strict=True):
        assert index.tolist() == other.tolist() == list(range(100, 100 + count))
        assert torch.equal(rows, others)
        assert torch.allclose(rows, one.given[0][1], atol=1e-6)
    read = [len((tmp_path / f"read{rank}").read_text().split()) for rank in range(2)]
    assert read[0] == read[1] == math.ceil(math.ceil(count / 4) / 2)


def test_says_what_the_data_module_lacks(method, points, trainer) -> None:
    class Data(points):
        set_pseudo_labels = None

    with pytest.raises(UserError, match=r"PseudoLabeler: Data has no set_pseudo_labels\(\)"):
        trainer(PseudoLabeler()).fit(method(), Data())
    with pytest.raises(ValueError, match="every_n_epochs=0 with at_start=False"):
        PseudoLabeler(0, at_start=False)
