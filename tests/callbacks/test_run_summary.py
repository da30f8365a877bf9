import json

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from callbacks import EMATeacher, PseudoLabelDiagnostics, RunSummary, SupervisedBaseline, Throughput
from callbacks.picture import draw, read_curves, show
from callbacks.run_summary import Counts, weights_of
from zoo.core.checkpoint_io import RunCheckpoint
from zoo.core.errors import UserError


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def logger(folder):
    return CSVLogger(folder, name="", version="")


def test_counts_by_hand() -> None:
    counts = Counts(2, bins=4)
    logits = torch.tensor([0.9, 0.6, 0.2, 0.55, 0.9]).logit()
    logits = torch.stack([logits, torch.zeros(5)], dim=1)  # p(class 0) as given
    counts.update(logits[:2], torch.tensor([0, 1]))
    counts.update(logits[2:], torch.tensor([1, 0, -1]))  # the last has no label
    assert counts.confusion.tolist() == [[2, 0], [1, 1]]
    assert counts.number.tolist() == [0, 0, 2, 2]
    assert counts.right.tolist() == [0, 0, 1, 2]
    # |1 - (0.6 + 0.55)| and |2 - (0.9 + 0.8)|, over four samples
    assert counts.calibration_error == pytest.approx((0.15 + 0.3) / 4, abs=1e-6)
    assert counts.accuracy == 0.75


def test_counts_agree_with_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

    logits, label = 2 * torch.randn(500, 7), torch.randint(7, (500,))
    counts = Counts(7)
    for part in range(0, 500, 100):
        counts.update(logits[part : part + 100], label[part : part + 100])
    assert torch.equal(counts.confusion, multiclass_confusion_matrix(logits, label, 7))
    expected = multiclass_calibration_error(logits.softmax(1), label, 7, n_bins=15)
    assert counts.calibration_error == pytest.approx(float(expected), abs=1e-5)


def test_file_table_and_picture(method, points, trainer, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    saver = ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="val/accuracy", mode="max", save_last=True)
    model, summary = method("averaged"), RunSummary(test_after_fit=True)
    trained = trainer(
        EMATeacher(),
        Throughput(),
        summary,
        saver,
        max_epochs=3,
        logger=logger(tmp_path),
        log_every_n_steps=2,
        enable_checkpointing=True,
    )
    trained.fit(model, points())
    found = read(tmp_path)
    metrics = found["metrics"]
    assert metrics["test/accuracy"] == metrics["val/accuracy"] == pytest.approx(summary.counts.accuracy)  # equal sets
    assert metrics["best/val/accuracy"] >= metrics["val/accuracy"]
    assert {"train/loss", "train/supervised"} <= set(metrics)
    assert found["best"]["val/accuracy"]["step"] in (6, 12, 18)
    assert (found["steps"], found["epochs"], found["seed"], found["method"]) == (18, 3, 7, "Averaged")
    assert found["data"] == "Points"
    assert found["throughput"]["images"] == 68
    assert found["environment"]["torch"] == torch.__version__.split("+")[0] or found["environment"]["torch"]
    assert int(summary.counts.confusion.sum()) == 24
    assert (tmp_path / "summary.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = capsys.readouterr().out
    for text in ("test/accuracy", "images/s", "waiting for data", "metrics.json", "summary.png"):
        assert text in shown
    assert "zoo test --config config.yaml --ckpt_path checkpoints/last.ckpt" in shown
    assert model.trainer is trained
    assert not model._forward_hooks


def test_a_test_adds_to_the_file(method, points, trainer, tmp_path) -> None:
    model = method()
    trainer(RunSummary()).fit(model, points())
    fitted = read(tmp_path)
    trainer(RunSummary()).test(model, points(), verbose=False)
    tested = read(tmp_path)
    assert tested["metrics"] == {**fitted["metrics"], "test/accuracy": tested["metrics"]["test/accuracy"]}
    assert tested["seed"] == fitted["seed"]
    assert set(tested["duration_seconds"]) == {"fit", "test"}


def test_the_best_is_the_largest_accuracy_and_survives_a_resume(method, points, trainer, tmp_path) -> None:
    class Script(Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            epoch = trainer.current_epoch
            pl_module.log("val/score", [0.5, 0.9, 0.7][epoch])
            pl_module.log("val/loss", [0.5, 0.9, 0.3][epoch])

    first = trainer(Script(), RunSummary(picture=False, table=False), max_epochs=2)
    first.fit(method(), points())
    first.save_checkpoint(tmp_path / "two.ckpt")
    summary = RunSummary(picture=False, table=False)
    trainer(Script(), summary, max_epochs=3).fit(method(), points(), ckpt_path=tmp_path / "two.ckpt")
    assert summary.best["val/score"] == {"value": pytest.approx(0.9), "step": 12, "epoch": 1}
    assert summary.best["val/loss"] == {"value": pytest.approx(0.3), "step": 18, "epoch": 2}
    assert read(tmp_path)["metrics"]["val/score"] == pytest.approx(0.7)
    assert not (tmp_path / "summary.png").exists()


def test_another_run_beside_this_one(method, points, trainer, tmp_path, capsys) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"metrics": {"val/accuracy": 0.125, "best/val/accuracy": 0.2}}))
    trainer(RunSummary(baseline=str(other))).fit(method(), points())
    assert read(tmp_path)["metrics"]["baseline/val/accuracy"] == 0.125
    assert "0.1250" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"RunSummary: baseline='nowhere.json'"):
        trainer(RunSummary(baseline="nowhere.json")).fit(method(), points())


def test_two_processes_count_every_sample(method, points, trainer, tmp_path, two_ranks) -> None:
    class Save(Callback):
        def on_fit_end(self, trainer, pl_module) -> None:
            torch.save(summary.counts.confusion, tmp_path / f"{trainer.global_rank}.pt")

    summary = RunSummary(table=False)
    trainer(summary, Save(), logger=logger(tmp_path), **two_ranks).fit(method(), points())
    assert [int(torch.load(tmp_path / f"{rank}.pt").sum()) for rank in range(2)] == [24, 24]
    assert read(tmp_path)["world_size"] == 2
    assert (tmp_path / "summary.png").is_file()


def test_curves_skip_gaps_and_torn_rows(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,val/accuracy\n0,1,0.5,\n0,3,,0.25\n0,5,0.125,\n1,7,0.")
    assert read_curves(path)["train/loss"] == ([1, 5, 7], [0.5, 0.125, 0.0])
    assert read_curves(path)["val/accuracy"] == ([3], [0.25])
    assert read_curves(tmp_path / "none.csv") == {}


def test_nothing_is_written_by_a_dry_run(method, points, trainer, tmp_path) -> None:
    trainer(RunSummary(), fast_dev_run=True).fit(method(), points())
    assert list(tmp_path.iterdir()) == []


class Spoil(Callback):
    """From the third epoch on, weights that are wrong about most: the second epoch stays the best."""

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch >= 2:
            with torch.no_grad():
                pl_module.network.norm.weight.mul_(-1)
                pl_module.network.norm.bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.0


@pytest.mark.parametrize("with_baseline", [False, True])
def test_last_and_best_are_tested(method, points, trainer, tmp_path, capsys, with_baseline) -> None:
    saver = RunCheckpoint(str(tmp_path / "checkpoints"))
    model, summary, data = method(), RunSummary(test_after_fit=True), points()
    more = [SupervisedBaseline(max_steps=2)] if with_baseline else []
    run = trainer(Spoil(), summary, saver, *more, max_epochs=3, enable_checkpointing=True)
    run.fit(model, data)
    found = read(tmp_path)
    metrics, best = found["metrics"], found["best_checkpoint"]
    assert metrics["test/accuracy"] == metrics["val/accuracy"] == pytest.approx(1 / 3)  # the sets are equal
    assert metrics["best/test/accuracy"] == metrics["best/val/accuracy"] == pytest.approx(best["value"])
    assert metrics["best/test/accuracy"] > 0.5
    assert best["step"] in (6, 12)
    assert best["monitor"] == "val/accuracy"
    # what is tested are the checkpoint's weights, and the run keeps its own
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())
    assert model.trainer is run
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    baseline = [f"{metrics['baseline/test/accuracy']:.4f}"] if with_baseline else []
    assert ["", "test/accuracy", "0.3333", f"{metrics['best/test/accuracy']:.4f}", *baseline, ""] in rows
    with weights_of(best["path"], model):
        trainer(logger=False).test(model, data, verbose=False)
        assert float(model.trainer.callback_metrics["test/accuracy"]) == pytest.approx(metrics["best/test/accuracy"])
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())


def test_the_best_is_the_last(method, points, trainer, tmp_path, monkeypatch) -> None:
    from callbacks import run_summary

    calls = []
    original = run_summary.evaluate
    monkeypatch.setattr(run_summary, "evaluate", lambda *a: (calls.append(1), original(*a))[1])
    saver = ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="val/accuracy", mode="max")
    trainer(RunSummary(test_after_fit=True), saver, enable_checkpointing=True).fit(method(), points())
    metrics = read(tmp_path)["metrics"]
    assert len(calls) == 1  # one epoch: the same weights are not tested twice
    assert metrics["best/test/accuracy"] == metrics["test/accuracy"]


def test_no_best_without_a_validation(method, points, trainer, tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", "last")  # without a metric "best" only means newest
    summary = RunSummary(test_after_fit=True)
    trainer(summary, saver, limit_val_batches=0, enable_checkpointing=True).fit(method(), points())
    found = read(tmp_path)
    assert "test/accuracy" in found["metrics"]
    assert not [name for name in found["metrics"] if name.startswith("best/")]
    assert "best_checkpoint" not in found


def test_a_choice_by_hidden_labels_is_not_called_the_best(method, points, trainer, tmp_path, capsys) -> None:
    class Oracle(Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            pl_module.log("oracle/accuracy", 1.0 - 0.1 * trainer.current_epoch)

    saver = ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="oracle/accuracy", mode="max")
    run = trainer(Oracle(), RunSummary(test_after_fit=True), saver, max_epochs=2, enable_checkpointing=True)
    run.fit(method(), points())
    found = read(tmp_path)
    assert "best/test/accuracy" not in found["metrics"]
    assert found["metrics"]["oracle/best/test/accuracy"] > 0  # it was asked for, and says what it is
    assert found["best_checkpoint"]["oracle"]
    shown = capsys.readouterr().out
    assert "epoch 1, by oracle/accuracy, which knows labels of the target" in shown
    assert "oracle/best" not in shown


def test_the_table_shows_what_was_measured_of_the_selected_weights(method, points, trainer, tmp_path, capsys) -> None:
    class Script(Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            pl_module.log("val/score", [0.1, 0.9, 0.5][trainer.current_epoch])
            pl_module.log("val/other", [0.3, 0.2, 0.7][trainer.current_epoch])

    saver = RunCheckpoint(str(tmp_path / "checkpoints"), monitor="val/score")
    summary = RunSummary(test_after_fit=True, picture=False)
    trainer(Script(), summary, saver, max_epochs=3, enable_checkpointing=True).fit(method(), points())
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["", "val/score", "0.5000", "0.9000", ""] in rows
    assert ["", "val/other", "0.7000", "0.2000", ""] in rows  # then, not ever
    metrics = read(tmp_path)["metrics"]
    assert metrics["best/val/other"] == pytest.approx(0.7)
    assert [
        "",
        "test/accuracy",
        *(f"{metrics[name]:.4f}" for name in ("test/accuracy", "best/test/accuracy")),
        "",
    ] in rows
    resumed = RunSummary()
    resumed.load_state_dict(summary.state_dict())
    assert resumed.beside == summary.beside


def report(classes: int, hidden: bool = True, threshold: bool = False) -> PseudoLabelDiagnostics:
    diagnostics = PseudoLabelDiagnostics()
    share = torch.rand(classes).tolist()
    diagnostics.per_class = {"share": share}
    values = {"utilization": 0.5}
    if hidden:
        diagnostics.per_class |= {"hidden_share": share, "precision": [None, *share[1:]], "recall": share}
        values["accuracy"] = 0.25
    if threshold:
        diagnostics.per_class["threshold"] = share
        values["threshold"] = 0.75
    diagnostics.history = [{"step": 6 * i, "epoch": i, **values} for i in range(1, 4)]
    return diagnostics


@pytest.mark.parametrize("classes", [3, 100])
def test_panels_of_pseudo_labels_where_there_are_any(tmp_path, classes) -> None:
    def titles(diagnostics) -> set[str]:
        figure = draw(tmp_path / "metrics.csv", None, None, "title", diagnostics)
        figure.savefig(tmp_path / "x.png")
        return {axis.get_title() for axis in figure.axes}

    always = {"training", "evaluation", "confusion matrix", "reliability"}
    assert titles(None) == titles(PseudoLabelDiagnostics()) == always
    some = {*always, "pseudo-labels", "share of the classes"}
    assert titles(report(classes, hidden=False)) == some
    assert titles(report(classes)) == titles(report(classes, False, True)) == {*some, "pseudo-labels per class"}
    figure = draw(tmp_path / "metrics.csv", None, None, "title", report(classes, threshold=True))
    legends = {axis.get_title(): axis.get_legend_handles_labels()[1] for axis in figure.axes}
    assert legends["pseudo-labels"] == ["accuracy", "threshold", "utilization"]
    assert legends["pseudo-labels per class"] == ["precision", "recall", "threshold"]
    assert legends["share of the classes"] == ["pseudo-labels", "hidden labels"]


def test_pseudo_labels_in_file_and_table(method, points, trainer, tmp_path, capsys) -> None:
    diagnostics = report(1000)
    diagnostics.on_train_start = lambda *a: None
    trainer(RunSummary(picture=False), diagnostics).fit(method(), points())
    found = read(tmp_path)
    assert found["metrics"]["pseudo/utilization"] == 0.5
    assert found["pseudo_labels"] == diagnostics.per_class
    assert len((tmp_path / "metrics.json").read_text().splitlines()) < 100  # a list of numbers is one line
    shown = capsys.readouterr().out
    assert "pseudo/accuracy" in shown
    trainer(RunSummary(picture=False)).fit(method(), points())
    assert "pseudo_labels" not in read(tmp_path)


def test_loggers_that_take_pictures_get_it(tmp_path) -> None:
    taken = []

    class Board(TensorBoardLogger):
        def __init__(self) -> None:
            pass

        @property
        def experiment(self):
            return self

        def add_image(self, tag, pixels, step, dataformats) -> None:
            taken.append((tag, pixels.shape, step, dataformats))

    class Weights(WandbLogger):
        def __init__(self) -> None:
            pass

        def log_image(self, key, images) -> None:
            taken.append((key, images[0].shape))

    figure = draw(tmp_path / "metrics.csv", None, None, "title")
    show(figure, [CSVLogger(tmp_path)], 3)
    assert taken == []
    show(figure, [Board(), Weights()], 3)
    assert taken == [("summary", (800, 1000, 3), 3, "HWC"), ("summary", (800, 1000, 3))]
