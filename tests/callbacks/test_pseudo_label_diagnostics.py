import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import PseudoLabelDiagnostics
from callbacks.picture import read_curves
from callbacks.pseudo_label_diagnostics import PseudoLabelCounts
from zoo.core.errors import UserError
from zoo.policies import Policy
from zoo.semi_supervised.base import SemiSupervised


class PerClass(Policy):
    def thresholds(self):
        return torch.tensor([0.5, 0.7, 0.9])


def scripted(method, answers=lambda x: x["index"] % 3, soft=False, threshold=False):
    """A method whose pseudo-labels follow from the index, and whose hidden labels are the labels."""
    model = method()
    model.watched = None
    model.policy = PerClass() if threshold else None
    plain = model.training_step

    def step(batch, batch_idx):
        x = batch["labeled"]
        targets = answers(x)
        weights = (x["index"] % 2 == 0).float()
        targets = torch.nn.functional.one_hot(targets, 3).float() if soft else targets
        SemiSupervised.watch(model, {"hidden_label": x["label"]}, targets, weights)
        return plain(batch, batch_idx)

    model.training_step = step
    return model


def test_counts_by_hand() -> None:
    counts = PseudoLabelCounts(3)
    counts.update(torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0, 1, 1]))
    counts.update(torch.tensor([1, 0]), torch.tensor([1.0, 1.0]), torch.tensor([1, -1]))  # the last is nobody's
    values = counts.values()
    assert values["utilization"] == pytest.approx(3.5 / 5)
    assert values["accuracy"] == pytest.approx((1 + 1) / (1 + 0.5 + 1))
    assert values["class_coverage"] == pytest.approx(2 / 3)
    # shares of weight 2.5/3.5, 1/3.5, 0 against 1/4, 3/4, 0
    assert values["class_distance"] == pytest.approx(2.5 / 3.5 - 1 / 4)
    classes = counts.per_class(torch.tensor([0.5, 0.6, 0.7]))
    assert classes["share"] == pytest.approx([2.5 / 3.5, 1 / 3.5, 0], abs=1e-5)
    assert classes["hidden_share"] == [0.25, 0.75, 0.0]
    assert classes["precision"] == [pytest.approx(1 / 1.5, abs=1e-5), 1.0, None]
    assert classes["recall"] == [1.0, pytest.approx(1 / 3, abs=1e-5), None]
    assert classes["threshold"] == pytest.approx([0.5, 0.6, 0.7])


def test_what_cannot_be_known_is_left_out() -> None:
    counts = PseudoLabelCounts(3)
    counts.update(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([-1, -1]))
    assert counts.values() == {"utilization": 0.5, "class_coverage": pytest.approx(1 / 3)}
    assert set(counts.per_class()) == {"share"}
    unused = PseudoLabelCounts(3)
    unused.update(torch.tensor([0, 1]), torch.zeros(2), torch.tensor([0, 1]))
    assert unused.values() == {"utilization": 0.0, "class_coverage": 0.0}
    assert unused.per_class()["precision"] == [None] * 3


@pytest.mark.parametrize("classes", [10, 1000])
def test_counts_equal_a_loop(classes) -> None:
    given, hidden = torch.randint(classes, (500,)), torch.randint(-1, classes, (500,))
    given[::3] = hidden[::3].clamp(min=0)
    weights = torch.rand(500)
    counts = PseudoLabelCounts(classes)
    for part in range(0, 500, 125):
        where = slice(part, part + 125)
        counts.update(given[where], weights[where].bfloat16(), hidden[where])
    weights = weights.bfloat16().double()
    rows = torch.zeros(4, classes + 1, dtype=torch.float64)
    for c, w, h in zip(given.tolist(), weights, hidden.tolist(), strict=True):
        rows[0, c] += w
        if h >= 0:
            rows[1, c] += w
            rows[2, c] += w * (c == h)
        rows[3, h] += h >= 0
    torch.testing.assert_close(counts.sums[:, :-1], rows[:, :-1])
    assert len(counts.per_class()["recall"]) == classes


def test_two_ranks_count_as_one(on_ranks) -> None:
    given, hidden, weights = torch.randint(1000, (64,)), torch.randint(1000, (64,)), torch.rand(64)

    def on_rank(rank: int):
        counts = PseudoLabelCounts(1000)
        where = slice(40 * rank, 40 * rank + 40 if rank == 0 else 64)
        counts.update(given[where], weights[where], hidden[where])
        counts.reduce()
        return [counts.sums, counts.samples]

    whole = PseudoLabelCounts(1000)
    whole.update(given, weights, hidden)
    for sums, samples in on_ranks(on_rank):
        torch.testing.assert_close(sums, whole.sums)
        assert samples == 64


@pytest.mark.parametrize("soft", [False, True])
def test_a_run(method, points, trainer, tmp_path, soft) -> None:
    diagnostics = PseudoLabelDiagnostics(every_n_steps=4)
    # right for the indices 100..111, always class 2 after that
    model = scripted(method, lambda x: torch.where(x["index"] < 112, x["label"], 2), soft, threshold=True)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(diagnostics, logger=logger, max_epochs=2, log_every_n_steps=1).fit(model, points())
    assert [(row["step"], row["epoch"]) for row in diagnostics.history] == [(6, 0), (12, 1)]
    # of the 12 even indices, six below 112; of the others, labels (i - 100) % 3 == 2 for 114 and 120
    assert diagnostics.values["utilization"] == 0.5
    assert diagnostics.values["accuracy"] == pytest.approx(8 / 12)
    assert diagnostics.values["threshold"] == pytest.approx(0.7)
    assert diagnostics.per_class["share"] == pytest.approx([2 / 12, 2 / 12, 8 / 12], abs=1e-5)
    assert diagnostics.per_class["recall"] == pytest.approx([2 / 8, 2 / 8, 4 / 8])
    logger.save()
    curves = read_curves(tmp_path / "metrics.csv")
    assert curves["pseudo/accuracy"][1] == pytest.approx([8 / 12] * 2)
    assert len(curves["train/utilization"][1]) == len(curves["train/pseudo_label_accuracy"][1]) == 12
    assert model.watched is None


def test_reports_beside_each_validation(method, points, trainer) -> None:
    diagnostics = PseudoLabelDiagnostics()
    model = scripted(method, lambda x: x["label"])
    trainer(diagnostics, val_check_interval=2, num_sanity_val_steps=1).fit(model, points())
    assert [row["step"] for row in diagnostics.history] == [2, 4, 6]
    assert all(row["accuracy"] == 1 for row in diagnostics.history)
    without = PseudoLabelDiagnostics()
    trainer(without, limit_val_batches=0, max_epochs=-1, max_steps=8).fit(scripted(method), points())
    assert [row["step"] for row in without.history] == [6, 8]


def note_samples(monkeypatch, folder) -> None:
    """Write down how many samples the first report of each rank is about."""
    original = PseudoLabelCounts.values

    def values(self, *arguments):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if not (path := folder / f"samples {rank}").exists():
            path.write_text(str(self.samples))
        return original(self, *arguments)

    monkeypatch.setattr(PseudoLabelCounts, "values", values)


@pytest.mark.parametrize("step", [3, 9])
def test_counts_survive_a_resume(method, points, trainer, tmp_path, monkeypatch, step) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, resumed = PseudoLabelDiagnostics(2), PseudoLabelDiagnostics(2)
    trainer(whole, Save(), max_epochs=2, limit_val_batches=0).fit(scripted(method), points())
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["PseudoLabelDiagnostics"]
    assert state["samples"] == 12  # three steps of four since the last report
    note_samples(monkeypatch, tmp_path)
    again = trainer(resumed, max_epochs=2, limit_val_batches=0)
    again.fit(scripted(method), points(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert (tmp_path / "samples 0").read_text() == "24"
    assert [row["step"] for row in resumed.history] == [row["step"] for row in whole.history] == [6, 12]


def test_the_state_is_what_was_counted() -> None:
    first = PseudoLabelDiagnostics()
    first._counts = PseudoLabelCounts(3)
    first._pending = [(torch.tensor([0, 1]), torch.ones(2), None)]
    state = copy.deepcopy(first.state_dict())
    assert state["samples"] == 2
    assert state["sums"][0].tolist() == [1, 1, 0, 0]
    assert PseudoLabelDiagnostics().state_dict() == {}


def test_two_processes(method, points, trainer, tmp_path, two_ranks, monkeypatch) -> None:
    class Save(Callback):
        def on_fit_end(self, trainer, pl_module) -> None:
            torch.save([diagnostics.values, diagnostics.per_class], tmp_path / f"{trainer.global_rank}.pt")

        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    answers = lambda x: torch.where(x["index"] < 112, x["label"], 2)  # noqa: E731
    diagnostics = PseudoLabelDiagnostics()
    trainer(diagnostics, Save(), **two_ranks).fit(scripted(method, answers), points())
    one = PseudoLabelDiagnostics()
    trainer(one).fit(scripted(method, answers), points())
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [one.values, one.per_class]
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]["PseudoLabelDiagnostics"]
    assert state["samples"] == 16  # two steps of four on both ranks

    # resumed, every rank has read the sums of both, and they count once
    note_samples(monkeypatch, tmp_path)
    again = trainer(PseudoLabelDiagnostics(), **two_ranks)
    again.fit(scripted(method, answers), points(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert (tmp_path / "samples 0").read_text() == (tmp_path / "samples 1").read_text() == "24"


class Reads(TorchDispatchMode):
    """Notes what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique_dim", "_unique2"):
            self.seen.append(name)
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("soft", [False, True])
def test_a_step_reads_nothing_from_the_device(method, soft) -> None:
    diagnostics, model = PseudoLabelDiagnostics(2), method()
    model.watched = diagnostics._pending
    diagnostics._counts = PseudoLabelCounts(3)
    targets = torch.rand(4, 3) if soft else torch.tensor([0, 1, 2, 0])
    with Reads() as reads:
        for _ in range(5):
            SemiSupervised.watch(model, {"hidden_label": torch.tensor([0, 1, -1, 2])}, targets, torch.rand(4))
            diagnostics.on_train_batch_end(None, model, None, None, 0)
        assert reads.seen == []
        diagnostics._counts.values()
        assert reads.seen  # only a report does
    assert diagnostics._counts.samples == 16
    assert len(diagnostics._pending) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_does_not_wait_for_cuda(method) -> None:
    diagnostics, model = PseudoLabelDiagnostics(2), method()
    model.watched, diagnostics._counts = diagnostics._pending, PseudoLabelCounts(3, "cuda")
    batch = {"hidden_label": torch.zeros(4, dtype=torch.long, device="cuda")}
    targets, weights = torch.rand(4, 3, device="cuda"), torch.rand(4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            SemiSupervised.watch(model, batch, targets, weights)
            diagnostics.on_train_batch_end(None, model, None, None, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert diagnostics._counts.samples == 16


def test_leaves_other_methods_alone(method, points, trainer) -> None:
    diagnostics, model = PseudoLabelDiagnostics(), method()
    trainer(diagnostics).fit(model, points())
    assert diagnostics.history == []
    assert not hasattr(model, "watched")
    # one that could watch and never does
    model = method()
    model.watched = None
    trainer(diagnostics).fit(model, points())
    assert diagnostics.history == []
    assert diagnostics.state_dict() == {}


def test_nothing_is_kept_where_nobody_looks(method) -> None:
    model = scripted(method)
    SemiSupervised.watch(model, {}, torch.zeros(2).long(), torch.ones(2))
    assert model.watched is None


def test_samples_that_nobody_knows_do_not_count_as_wrong(method, monkeypatch) -> None:
    model, seen = scripted(method), {}
    monkeypatch.setattr(type(model), "logs_now", True)
    model.observe = lambda **values: seen.update(values)
    hidden = torch.tensor([1, 2, -1, -1])
    SemiSupervised.watch(model, {"hidden_label": hidden}, torch.tensor([1, 1, 1, 0]), torch.tensor([1, 0.5, 1, 0]))
    assert float(seen["utilization"]) == pytest.approx(2.5 / 4)
    assert float(seen["pseudo_label_accuracy"]) == pytest.approx(1 / 1.5)


def test_argument() -> None:
    with pytest.raises(UserError, match="every_n_steps=0"):
        PseudoLabelDiagnostics(0)
