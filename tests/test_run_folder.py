"""The run folder's own logger; the rest is tested through the command line."""

import csv

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from zoo.run_folder import RunLogger


def log(folder, step, **metrics):
    logger = RunLogger(folder)
    logger.log_metrics(metrics, step)
    logger.save()


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_resumed_run_keeps_the_rows_of_the_first(tmp_path):
    log(tmp_path, 1, loss=2.0)
    (tmp_path / "config.yaml").touch()
    log(tmp_path, 2, loss=1.0)
    log(tmp_path, 3, loss=0.5, accuracy=0.9)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["loss"], row["accuracy"]) for row in rows] == [
        ("1", "2.0", ""),
        ("2", "1.0", ""),
        ("3", "0.5", "0.9"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.csv"]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_rows_outlive_a_start_that_fails(tmp_path, monkeypatch):
    log(tmp_path, 1, loss=2.0)
    with monkeypatch.context() as broken:
        broken.setattr("lightning.pytorch.loggers.csv_logs.ExperimentWriter", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            log(tmp_path, 2, loss=1.0)
    assert "2.0" in next(tmp_path.iterdir()).read_text()
    log(tmp_path, 2, loss=1.0)  # the next start finds them
    assert [row["loss"] for row in csv.DictReader((tmp_path / "metrics.csv").open())] == ["2.0", "1.0"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_other_ranks_leave_the_file_alone(tmp_path, monkeypatch):
    """Rank 0 moves it while the others start: one that looks for it can miss it."""
    (tmp_path / "metrics.csv").mkdir()  # whoever opens it fails
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr("pathlib.Path.is_file", lambda self: True)
    assert type(RunLogger(tmp_path).experiment).__name__ == "_DummyExperiment"
    assert (tmp_path / "metrics.csv").is_dir()
