"""Rounds of self-training: ``PseudoLabeler`` with a selection, on the real data module and method."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from callbacks import EMATeacher, PseudoLabeler
from callbacks.pseudo_labeler import read_pseudo_labels
from datamodules import Blobs, SemiSupervisedData
from zoo import SelfTraining, Supervised
from zoo.core.checkpoint_io import RunCheckpoint
from zoo.core.errors import UserError
from zoo.core.schedules import CosineLR
from zoo.policies import Balanced, ConfidenceThreshold, Curriculum, MeanVote, MostConfident, Selection

STEPS = 3  # an epoch
KEYS = ("index", "pseudo_label", "pseudo_label_weight")


class Layer(nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.layer = nn.Linear(64, num_outputs)

    def forward(self, x):
        return self.layer(x.flatten(1)) / 8


class Watch(Callback):
    """What every step sees: its labels, weights, learning rate, the network before it, and how the optimizer is."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        self.seen.append(
            {
                **{k: batch["unlabeled"][k].clone() for k in KEYS if k in batch["unlabeled"]},
                "weight": pl_module.network.layer.weight.detach().clone(),
                "average": pl_module.teacher.module.layer.weight.clone(),
                "updates": pl_module.teacher.updates.clone(),
                "lr": optimizer.param_groups[0]["lr"],
                "moments": sum(float(s["exp_avg"].abs().sum()) for s in optimizer.state.values()),
            }
        )


def method(kind=SelfTraining, **arguments):
    torch.manual_seed(0)
    optimizer = partial(torch.optim.Adam, lr=0.05)
    settings = {"network": Layer, "num_classes": 3, "optimizer": optimizer, "momentum": 0.5}
    return kind(**{**settings, "scheduler": partial(CosineLR, warmup_steps=2), **arguments})


def blobs(kind=SemiSupervisedData, samples=60, **arguments):
    settings = {"labels_per_class": 2, "batch_size": 4, "unlabeled_ratio": 2, "steps": STEPS, "val_size": 9}
    return kind(Blobs(samples=samples), **{**settings, "eval_batch_size": 16, **arguments})


def fit(folder, *callbacks, model=None, data=None, ckpt_path=None, **arguments):
    model, data, watch = model or method(), data or blobs(), Watch()
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 6,
        "callbacks": [EMATeacher(), watch, *callbacks],
    }
    trainer = Trainer(**{**settings, **arguments})
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, data, watch.seen, trainer


def loop(select=MeanVote, **arguments):
    """Rounds after epochs 2, 4 and 6, the last of which no training follows."""
    return PseudoLabeler(**{"every_n_epochs": 2, "at_start": False, "select": select, "hard": True, **arguments})


class Record(PseudoLabeler):
    """Keeps the targets and weights of every round."""

    def relabel(self, trainer, pl_module, epoch=0):
        changed = super().relabel(trainer, pl_module, epoch)
        self.rounds = [*getattr(self, "rounds", []), (self.probabilities.clone(), self.weights.clone())]
        return changed


def record(select=MeanVote, **arguments):
    return Record(**{"every_n_epochs": 2, "at_start": False, "select": select, "hard": True, **arguments})


def test_threshold_one_is_supervised_bit_for_bit(tmp_path):
    select = partial(ConfidenceThreshold, threshold=1.0)
    own, _, seen, _ = fit(tmp_path, loop(select))
    supervised, _, _, _ = fit(tmp_path, model=method(Supervised))
    assert len(seen) == 18
    for name, value in supervised.state_dict().items():
        assert torch.equal(value, own.state_dict()[name]), name


def test_threshold_one_stops_at_the_first_round_and_zero_after_one_training_on_everything(tmp_path):
    labeler = loop(partial(ConfidenceThreshold, threshold=1.0), stop=True)
    _, _, seen, trainer = fit(tmp_path, labeler)
    assert (labeler.round, labeler.stopped, trainer.global_step) == (1, True, 2 * STEPS)
    labeler = loop(partial(ConfidenceThreshold, threshold=0.0), stop=True)
    _, _, seen, trainer = fit(tmp_path, labeler)
    assert (labeler.round, labeler.stopped, trainer.global_step) == (1, True, 4 * STEPS)
    assert not any(step["pseudo_label_weight"].any() for step in seen[: 2 * STEPS])
    assert all(step["pseudo_label_weight"].all() for step in seen[2 * STEPS :])


def test_nothing_new_stops(tmp_path):
    class Half(Selection):
        def weights(self, probabilities, number, rounds, prior):
            return (torch.arange(len(probabilities)) < 20).float() * (number == 1)

    labeler = loop(Half, keep=True, stop=True)
    _, _, _, trainer = fit(tmp_path, labeler, max_epochs=20)
    assert (labeler.round, trainer.global_step) == (2, 4 * STEPS)
    assert int(labeler.weights.sum()) == 20


def test_without_stop_all_epochs_are_trained(tmp_path):
    labeler = loop(partial(ConfidenceThreshold, threshold=0.0))
    assert fit(tmp_path, labeler)[3].global_step == 6 * STEPS
    assert labeler.round == 3


def test_kept_samples_keep_label_and_weight_while_others_join(tmp_path):
    labeler = record(partial(MostConfident, fraction=0.5), keep=True)
    fit(tmp_path, labeler)
    for (targets, weights), (later, more) in zip(labeler.rounds, labeler.rounds[1:], strict=False):
        kept = weights > 0
        assert torch.equal(targets[kept], later[kept])
        assert torch.equal(weights[kept], more[kept])
        assert int(more.sum()) == int(kept.sum()) + int((~kept).sum()) // 2


def test_curriculum_of_a_run_ends_with_everything_and_labels_anew(tmp_path):
    labeler = record(partial(Curriculum, step=None), hard=False)
    fit(tmp_path, labeler)
    assert [int(weights.sum()) for _, weights in labeler.rounds] == [25, 51, 51]  # 51 samples, two rounds that count
    assert not torch.allclose(labeler.rounds[0][0], labeler.rounds[1][0])


def test_batches_see_the_targets_and_weights_of_their_round(tmp_path):
    labeler = record(partial(Balanced, count=8, threshold=0.0))
    _, data, seen, _ = fit(tmp_path, labeler)
    ids = data.roles["unlabeled"].samples.ids
    for number in (0, 1):
        targets, weights = labeler.rounds[number]
        assert set(targets.unique().tolist()) == {0.0, 1.0}
        for step in seen[2 * STEPS * (number + 1) : 2 * STEPS * (number + 2)]:
            row = torch.searchsorted(ids, step["index"])
            assert torch.equal(step["pseudo_label_weight"], weights[row])
            assert torch.equal(step["pseudo_label"], targets[row] * (weights[row] > 0)[:, None])


def test_restart_goes_back_to_the_initial_weights_and_clears_the_optimizer(tmp_path):
    _, _, seen, _ = fit(tmp_path, loop(restart=True))
    for first in (0, 2 * STEPS, 4 * STEPS):
        assert torch.equal(seen[first]["weight"], seen[0]["weight"])
        assert torch.equal(seen[first]["average"], seen[0]["average"])
        assert int(seen[first]["updates"]) == 0
        assert seen[first]["moments"] == 0.0
        for step in range(first + 1, first + 2 * STEPS):
            assert not torch.equal(seen[step]["weight"], seen[0]["weight"])
            assert seen[step]["moments"] > 0.0
    assert any(step["pseudo_label_weight"].any() for step in seen[2 * STEPS :])


def test_schedules_are_those_of_a_round(tmp_path):
    _, _, seen, _ = fit(tmp_path, loop(restart=True))
    rates = [step["lr"] for step in seen]
    _, _, alone, _ = fit(tmp_path, max_epochs=2)
    expected = [step["lr"] for step in alone]
    assert rates == pytest.approx(expected * 3)
    assert expected[0] == pytest.approx(0.025)
    _, _, going_on, _ = fit(tmp_path, loop())
    assert [step["lr"] for step in going_on] != pytest.approx(rates)
    assert not torch.equal(going_on[2 * STEPS]["weight"], going_on[0]["weight"])


def test_checkpoints_at_the_end_of_a_round_hold_what_was_trained(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    model, _, seen, _ = fit(tmp_path, loop(restart=True), save)
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    fit(tmp_path / "alone", max_epochs=2, model=(trained := method()))
    assert torch.equal(state["network.layer.weight"], trained.network.layer.weight)
    assert not torch.equal(state["network.layer.weight"], seen[0]["weight"])
    assert not torch.equal(model.network.layer.weight, seen[0]["weight"])  # nor does the end of the run start again


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("stop", "by_epoch"), [(7, False), (8, False), (6, True), (6, False), (12, False), (3, True)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop, by_epoch, restart):
    """Round 1 after step 6, round 2 after step 12. At 6 and 12, a checkpoint by step comes before the round."""

    def run(folder, ckpt_path=None):
        when = {"every_n_epochs": 1} if by_epoch else {"every_n_train_steps": stop}
        save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=by_epoch, **when)
        labeler = loop(partial(MostConfident, fraction=0.5), keep=True, restart=restart)
        model, _, seen, _ = fit(folder, labeler, save, ckpt_path=ckpt_path)
        return model, labeler, seen

    whole, labels, seen = run(tmp_path / "whole")
    torch.manual_seed(99)
    rest, again, later = run(tmp_path / "rest", tmp_path / "whole" / f"step={stop}.ckpt")
    assert len(later) == len(seen) - stop
    for one, other in zip(later, seen[stop:], strict=True):
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    assert (again.round, again.history) == (labels.round, labels.history)
    assert torch.equal(again.weights, labels.weights)


@pytest.mark.parametrize("counted", [{"max_epochs": 6}, {"max_epochs": -1, "max_steps": 18}])
@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_the_last_checkpoint_of_a_shorter_run_goes_on(tmp_path, epochs, counted):
    """``last.ckpt``, written at the end of an epoch that ended with a round, or of one that did not."""

    def run(folder, ckpt_path=None, **arguments):
        labeler = loop(partial(MostConfident, fraction=0.5), restart=True)
        model = method(scheduler=partial(CosineLR, total_steps=2 * STEPS))
        model, _, seen, _ = fit(folder, labeler, RunCheckpoint(), model=model, ckpt_path=ckpt_path, **arguments)
        return model, labeler, seen

    shorter = {"max_epochs": epochs} if "max_steps" not in counted else {"max_epochs": -1, "max_steps": epochs * STEPS}
    whole, labels, seen = run(tmp_path / "whole", **counted)
    run(tmp_path / "part", **shorter)
    rest, again, later = run(tmp_path / "rest", next((tmp_path / "part").rglob("last.ckpt")), **counted)
    assert len(later) == 18 - epochs * STEPS
    for one, other in zip(later, seen[-len(later) :], strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    assert again.history == labels.history
    assert torch.equal(whole.network.layer.weight, rest.network.layer.weight)


def test_a_stopped_run_stays_stopped(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    select = partial(ConfidenceThreshold, threshold=1.0)
    fit(tmp_path, loop(select, stop=True), save)
    _, _, seen, trainer = fit(tmp_path, labeler := loop(select, stop=True), ckpt_path=tmp_path / "step=6.ckpt")
    assert (len(seen), trainer.global_step, labeler.stopped) == (0, 2 * STEPS, True)


def test_the_same_callback_in_another_training_starts_anew(tmp_path):
    labeler = loop(partial(ConfidenceThreshold, threshold=0.0), restart=True, stop=True)
    _, _, first, _ = fit(tmp_path, labeler)
    _, _, second, _ = fit(tmp_path / "second", labeler, model=method(momentum=0.25))
    assert len(first) == len(second) == 4 * STEPS
    assert torch.equal(second[2 * STEPS]["average"], second[0]["average"])


def test_two_processes_agree(tmp_path):
    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            labeler = next(c for c in trainer.callbacks if isinstance(c, PseudoLabeler))
            own = [labeler.probabilities, labeler.weights, *pl_module.state_dict().values()]
            torch.save(own, tmp_path / f"{trainer.global_rank}.pt")

    labeler = loop(partial(MostConfident, fraction=0.5), keep=True, restart=True)
    data = blobs(batch_size=2)
    fit(tmp_path, labeler, Save(), data=data, strategy="ddp_fork", devices=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    assert int(one[1].sum()) == 25 + 13 + 6  # half of what is left, three times


def test_what_hidden_labels_say_is_logged_and_nothing_else(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    class Wrong(SemiSupervisedData):
        def make_roles(self):
            roles = super().make_roles()
            roles["unlabeled"].samples.labels = (roles["unlabeled"].samples.labels + 1) % 3
            return roles

    labelers = [loop(MeanVote), loop(MeanVote)]
    right, _, _, trainer = fit(tmp_path, labelers[0], logger=CSVLogger(tmp_path, version=0))
    wrong, _, _, _ = fit(tmp_path, labelers[1], data=blobs(Wrong))
    for name, value in right.state_dict().items():
        assert torch.equal(value, wrong.state_dict()[name]), name
    first, second = (labeler.history for labeler in labelers)
    assert [entry["round"] for entry in first] == [1, 2, 3]
    assert [entry["epoch"] for entry in first] == [2, 4, 6]
    assert [entry["selected"] for entry in first] == [entry["selected"] for entry in second]
    assert first[-1]["selected"] == pytest.approx(float((labelers[0].weights > 0).float().mean()))
    assert first[-1]["accuracy"] > second[-1]["accuracy"]
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "round/selected" in text
    assert "round/accuracy" in text
    assert not any("round" in name for name in trainer.callback_metrics)


def test_the_file_of_a_run_labels_another_one(tmp_path):
    labeler = loop(partial(MostConfident, fraction=0.5), hard=False)
    fit(tmp_path, labeler)
    file = tmp_path / "pseudo_labels.safetensors"
    index, probabilities, number = read_pseudo_labels(file)
    assert number == 3
    _, _, seen, _ = fit(tmp_path / "next", data=blobs(pseudo_labels=str(file)), max_epochs=1)
    for step in seen:
        row = torch.searchsorted(index, step["index"])
        assert torch.equal(step["pseudo_label_weight"], labeler.weights[row])
        assert torch.equal(step["pseudo_label"], probabilities[row] * labeler.weights[row, None])
    with pytest.raises(UserError, match="there is no such file"):
        fit(tmp_path / "none", data=blobs(pseudo_labels=str(tmp_path / "none.safetensors")))


def test_warns_where_nobody_labels(tmp_path):
    with pytest.warns(UserWarning, match="learns from the labels alone"):
        fit(tmp_path, max_epochs=1)


def test_a_selection_is_told_the_round_the_number_of_rounds_and_the_prior(tmp_path):
    told = []

    class Told(Selection):
        def weights(self, probabilities, number, rounds, prior):
            told.append((number, rounds, [round(share, 4) for share in prior.tolist()]))
            return super().weights(probabilities, number, rounds, prior)

    fit(tmp_path, PseudoLabeler(2, select=Told), max_epochs=5)
    third = round(1 / 3, 4)
    assert told == [(number, 3, [third] * 3) for number in (1, 2, 3)]  # at the start, after 2 and after 4


def test_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="keep=True needs a selection"):
        PseudoLabeler(keep=True)
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(tmp_path, loop(), save, max_epochs=1)
    with pytest.raises(UserError, match="holds no initial weights"):
        fit(tmp_path / "other", loop(restart=True), ckpt_path=tmp_path / "step=3.ckpt")
    data = blobs()
    data.setup("fit")
    for weights in (torch.ones(3), torch.tensor([2.0, 0.0]), torch.tensor([math.nan, 0.0])):
        with pytest.raises(UserError, match=r"\(N,\) in \[0, 1\]"):
            data.set_pseudo_labels(torch.arange(2), torch.ones(2, 3), weights)


def test_reads_the_state_of_an_earlier_version():
    labeler = PseudoLabeler()
    labeler.load_state_dict({"round": 1, "epoch": 1, "index": torch.arange(4), "probabilities": torch.ones(4, 2) / 2})
    assert labeler.weights.tolist() == [1.0] * 4
    assert not labeler.stopped
