import errno
import io
import os

import pytest
import torch

from zoo.core.checkpoint_io import AtomicCheckpointIO, RunCheckpoint, reopen_epoch
from zoo.core.errors import UserError


class FullDisk(io.FileIO):
    """A file on a disk with room for a few bytes."""

    room = 100

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path, mode: FullDisk(path, "w"))


def test_round_trip(tmp_path):
    path = tmp_path / "made" / "x.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"state_dict": {"w": torch.arange(3)}}, path)
    writer.save_checkpoint({"state_dict": {"w": torch.arange(4)}}, path)
    assert writer.load_checkpoint(path, weights_only=True)["state_dict"]["w"].tolist() == [0, 1, 2, 3]
    assert os.listdir(path.parent) == ["x.ckpt"]


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, full_disk):
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.ones(2)}, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"No space left on device; the previous checkpoint is kept"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(1000)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_full_disk_without_a_previous_checkpoint_leaves_nothing(tmp_path, full_disk):
    with pytest.raises(UserError, match=r"No space left on device; nothing was written"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(1000)}, tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path / ".x.ckpt.tmp").write_bytes(b"half of a checkpoint")
    AtomicCheckpointIO().save_checkpoint({"w": torch.ones(2)}, tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == ["x.ckpt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_after_writing_keeps_the_previous_checkpoint(tmp_path, monkeypatch, call):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"previous")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="Input/output error"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(3)}, path)
    assert path.read_bytes() == b"previous"
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_other_errors_are_not_disguised(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"f": lambda: None}, tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == []


class Trainer:
    """What RunCheckpoint asks of a trainer whose epochs have one step each."""

    fast_dev_run = sanity_checking = is_last_batch = False
    is_global_zero, world_size, loggers, check_val_every_n_epoch, val_check_interval = True, 1, [], 1, 1.0
    _val_check_time_interval = None

    def __init__(self, folder, validates=True):
        from lightning.pytorch.strategies import SingleDeviceStrategy
        from lightning.pytorch.trainer.states import TrainerFn

        self.default_root_dir, self.num_val_batches = str(folder), [1 if validates else 0]
        self.strategy = SingleDeviceStrategy("cpu")
        self.state = type("State", (), {"fn": TrainerFn.FITTING})
        self.callback_metrics, self.current_epoch, self.global_step, self.saved = {}, -1, 0, []

    def save_checkpoint(self, path, weights_only=False):
        self.saved.append(os.path.basename(path))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(str(self.global_step))

    def epoch(self, callback, **metrics):
        self.current_epoch += 1
        self.global_step += 1
        self.callback_metrics = {name: torch.tensor(value) for name, value in metrics.items()}
        self.saved = []
        callback.on_validation_end(self, None)
        callback.on_train_epoch_end(self, None)
        return self.saved


def test_last_is_written_also_after_a_worse_epoch(tmp_path):
    trainer, callback = Trainer(tmp_path), RunCheckpoint()
    callback.setup(trainer, None, "fit")
    callback.on_train_start(trainer, None)
    assert trainer.epoch(callback, **{"val/accuracy": 0.5}) == ["best.ckpt", "last.ckpt"]
    assert trainer.epoch(callback, **{"val/accuracy": 0.4}) == ["last.ckpt"]
    assert trainer.epoch(callback, **{"val/accuracy": 0.6}) == ["best.ckpt", "last.ckpt"]
    assert trainer.epoch(callback, **{"val/accuracy": 0.6}) == ["last.ckpt"]
    assert {path.name: path.read_text() for path in (tmp_path / "checkpoints").iterdir()} == {
        "best.ckpt": "3",
        "last.ckpt": "4",
    }


def test_without_validation_only_last_is_written(tmp_path):
    trainer, callback = Trainer(tmp_path, validates=False), RunCheckpoint()
    callback.setup(trainer, None, "fit")
    assert trainer.epoch(callback) == ["last.ckpt"]
    assert trainer.epoch(callback) == ["last.ckpt"]


def test_first_metric_that_is_logged_is_monitored(tmp_path):
    trainer, callback = Trainer(tmp_path), RunCheckpoint()
    callback.setup(trainer, None, "fit")
    assert trainer.epoch(callback, **{"val/miou": 0.5}) == ["best.ckpt", "last.ckpt"]
    assert trainer.epoch(callback, **{"val/miou": 0.4}) == ["last.ckpt"]
    assert callback.monitor == "val/miou"


def test_what_is_seen_of_an_unlabelled_target_comes_before_the_source_and_an_oracle_never_by_itself(tmp_path):
    trainer, callback = Trainer(tmp_path), RunCheckpoint()
    callback.setup(trainer, None, "fit")
    said = {
        "validator/information_maximization": 0.5,
        "val/accuracy": 0.9,
        "oracle/accuracy": 0.1,
        "validator/entropy": 0,
    }
    assert trainer.epoch(callback, **said) == ["best.ckpt", "last.ckpt"]
    assert callback.monitor == "validator/information_maximization"
    better = {**said, "val/accuracy": 1.0, "oracle/accuracy": 1.0, "validator/entropy": 1}
    assert trainer.epoch(callback, **better) == ["last.ckpt"]
    assert not [name for name in RunCheckpoint().names if name.startswith("oracle")]
    typed = RunCheckpoint(monitor="oracle/accuracy")
    typed.setup(trainer, None, "fit")
    trainer.epoch(typed, **said)
    assert typed.monitor == "oracle/accuracy"


def test_values_of_two_metrics_are_not_compared(tmp_path):
    trainer, callback = Trainer(tmp_path), RunCheckpoint()
    callback.setup(trainer, None, "fit")
    trainer.epoch(callback, **{"val/accuracy": 0.9})
    resumed = RunCheckpoint()
    resumed.setup(trainer, None, "fit")
    resumed.load_state_dict(callback.state_dict())
    said = {"val/accuracy": 0.95, "validator/information_maximization": 0.2}  # less than the accuracy was
    assert trainer.epoch(resumed, **said) == ["best.ckpt", "last.ckpt"]
    assert float(resumed.best_model_score) == pytest.approx(0.2)
    assert trainer.epoch(resumed, **{**said, "validator/information_maximization": 0.1}) == ["last.ckpt"]


def test_training_that_stops_within_an_epoch_keeps_its_last_state(tmp_path):
    trainer, callback = Trainer(tmp_path), RunCheckpoint()
    callback.setup(trainer, None, "fit")
    trainer.epoch(callback, **{"val/accuracy": 0.5})
    trainer.saved = []
    callback.on_train_end(trainer, None)
    assert trainer.saved == []
    trainer.global_step += 3
    callback.on_train_end(trainer, None)
    assert trainer.saved == ["last.ckpt"]
    assert (tmp_path / "checkpoints" / "last.ckpt").read_text() == str(trainer.global_step)


def test_order_of_the_states_survives_a_resume(tmp_path):
    trainer, callback = Trainer(tmp_path), RunCheckpoint()
    callback.setup(trainer, None, "fit")
    trainer.epoch(callback, **{"val/accuracy": 0.5})
    resumed = RunCheckpoint()
    resumed.setup(trainer, None, "fit")
    resumed.load_state_dict(callback.state_dict())
    assert trainer.epoch(resumed, **{"val/accuracy": 0.4}) == ["last.ckpt"]
    assert trainer.epoch(resumed, **{"val/accuracy": 0.6}) == ["best.ckpt", "last.ckpt"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_last_is_written_within_an_epoch_every_n_steps(tmp_path):
    trainer, callback = Trainer(tmp_path), RunCheckpoint(every_n_epochs=100, every_n_steps=2)
    callback.setup(trainer, None, "fit")

    def step(last_batch=False):
        trainer.global_step, trainer.is_last_batch, trainer.saved = trainer.global_step + 1, last_batch, []
        callback.on_train_batch_end(trainer, None, None, None, 0)
        return trainer.saved

    trainer.current_epoch = 0
    assert [step(), step(), step(), step(last_batch=True)] == [[], ["last.ckpt"], [], []]
    trainer.callback_metrics = {"val/accuracy": torch.tensor(0.5)}
    callback.on_train_epoch_end(trainer, None)  # step 4 is due, and its validation is over
    assert trainer.saved == ["best.ckpt", "last.ckpt"]
    with pytest.raises(UserError, match="every_n_steps=0 must be at least 1"):
        RunCheckpoint(every_n_steps=0)


def progress(started, processed, completed, last_batch):
    counts = {"ready": started, "started": started, "processed": processed, "completed": completed}
    return {
        "epoch_progress": {"current": dict(counts), "total": dict(counts)},
        "epoch_loop.batch_progress": {"is_last_batch": last_batch},
    }


@pytest.mark.parametrize(
    ("started", "processed", "completed", "last_batch", "counted_in_steps", "expected"),
    [
        (0, 0, 0, False, True, (0, 0)),  # not begun
        (2, 1, 1, False, True, (1, 1)),  # saved within the second epoch
        (2, 2, 2, False, True, (1, 1)),  # stopped within it
        (2, 2, 2, False, False, (1, 1)),
        (2, 2, 1, True, True, (1, 1)),  # over
        (2, 2, 1, True, False, (2, 1)),
    ],
)
def test_only_an_epoch_that_was_over_stays_over(started, processed, completed, last_batch, counted_in_steps, expected):
    loop = progress(started, processed, completed, last_batch)
    reopen_epoch(loop, counted_in_steps)
    for counts in loop["epoch_progress"].values():
        assert (counts["processed"], counts["completed"]) == expected
        assert counts["started"] == counts["ready"] == started
