import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from callbacks import Throughput
from callbacks.throughput import count_images


def test_every_view_counts() -> None:
    image, long = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    unlabeled = {"weak": torch.zeros(6, 3, 4, 4), "strong": torch.zeros(6, 3, 4, 4, dtype=torch.bfloat16)}
    assert count_images({"labeled": {"image": image, "label": long}, "unlabeled": {**unlabeled, "index": long}}) == 14
    assert count_images({"image": image, "mask": torch.zeros(2, 4, 4, dtype=torch.long)}) == 2
    assert count_images({"input_ids": torch.zeros(5, 7, dtype=torch.long), "attention_mask": torch.ones(5, 7)}) == 5
    assert count_images([image, long]) == 2
    assert count_images((image.byte(), None)) == 2


class Clock:
    """A clock that each event advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", made)
    return made


def timed(model, data, clock, step: float, wait: float, validation: float) -> None:
    def later(function, seconds):
        def called(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)

        return called

    model.training_step = later(model.training_step, step)
    model.validation_step = later(model.validation_step, validation)
    model.on_before_batch_transfer = lambda batch, _: clock_wait(model, clock, batch, wait)


def clock_wait(model, clock, batch, wait):
    clock.now += wait if model.trainer.training else 0.0
    return batch


def test_rates(method, points, trainer, tmp_path, clock) -> None:
    model, data, throughput = method(), points(), Throughput()
    timed(model, data, clock, step=0.3, wait=0.1, validation=100.0)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(throughput, max_epochs=2, logger=logger, log_every_n_steps=2).fit(model, data)
    found = throughput.summary
    assert found["steps"] == 11  # the first is warm-up
    assert found["images"] == 44
    # the wait for the batch after the validation is not seen in epoch 0 (it ends one), but in epoch 1's start
    assert found["seconds"] == pytest.approx(11 * 0.4)
    assert found["images_per_second"] == pytest.approx(10.0)
    assert found["data_wait"] == pytest.approx(0.25)
    assert found["peak_memory_mib"] > 10
    rows = (tmp_path / "metrics.csv").read_text()
    assert "throughput/images_per_second" in rows
    assert "throughput/data_wait" in rows


def test_counters_resume(method, points, trainer, tmp_path) -> None:
    first = trainer(Throughput(), max_epochs=1)
    first.fit(method(), points())
    first.save_checkpoint(tmp_path / "one.ckpt")
    again = Throughput()
    trainer(again, max_epochs=2).fit(method(), points(), ckpt_path=tmp_path / "one.ckpt")
    assert again.summary["steps"] == 10  # every start warms up once
    assert again.summary["images"] == 40


def test_two_processes_add_up(method, points, trainer, tmp_path, two_ranks) -> None:
    from lightning.pytorch import Callback

    class Save(Callback):
        def on_fit_end(self, trainer, pl_module) -> None:
            torch.save(throughput.summary, tmp_path / f"{trainer.global_rank}.pt")

    throughput = Throughput(warmup_steps=0)
    trainer(throughput, Save(), **two_ranks).fit(method(), points())
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("images_per_second", "data_wait", "peak_memory_mib"):
        assert a[name] == b[name] > 0
    assert a["images_per_second"] == pytest.approx(2 * a["images_per_second_per_rank"])
    assert a["images"] == b["images"] == 12


def test_warmup_is_checked() -> None:
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        Throughput(-1)


def test_a_row_of_token_ids_counts_as_one():
    ids = torch.zeros(3, 5, dtype=torch.int64)
    label = torch.zeros(3, dtype=torch.int64)
    assert count_images({"labeled": {"image": ids, "label": label}, "unlabeled": {"weak": ids, "strong": ids}}) == 9
    assert count_images({"input_ids": ids, "attention_mask": ids}) == 3
