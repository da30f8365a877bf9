import json
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from zoo import benchmark as b
from zoo.core.errors import UserError

ROOT = Path(__file__).parents[1]


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def two_cases():
    return {
        "repeats": 3,
        "cases": {
            "ours": {"command": "python ours.py", "pair": "theirs", "goals": {"ratio": {"us": 1.0}}},
            "theirs": {"python": "m:f", "args": {"n": 3}},
        },
    }


def test_repeats_are_interleaved_and_ratios_are_taken_repeat_by_repeat(tmp_path):
    order = []
    figures = {"ours": [10, 30, 12], "theirs": [20, 20, 20]}

    def runner(case, threads):
        order.append(case.name)
        assert threads == 1
        return f"noise\n{json.dumps({'us': figures[case.name][order.count(case.name) - 1], 'name': 'x'})}\n"

    report = b.run(b.Benchmark.read(write(tmp_path / "b.yaml", two_cases())), runner)
    assert order == ["ours", "theirs"] * 3
    ours = report["cases"]["ours"]
    assert ours["figures"]["us"] == {"median": 12.0, "min": 10.0, "max": 30.0, "values": [10.0, 30.0, 12.0]}
    assert ours["against"]["ratio"]["us"]["values"] == [0.5, 1.5, 0.6]
    assert ours["against"]["difference"]["us"]["median"] == -8.0
    assert ours["goals"] == [{"kind": "ratio", "figure": "us", "limit": 1.0, "median": 0.6, "met": True}]
    b._print(report, Console(file=(tmp_path / "out").open("w"), width=200))
    json.dumps(report)


def test_a_pair_of_zero_has_no_ratio():
    case = b.Case("a", ("x",), "z")
    result = b.compare([{"us": 1.0, "mine": 2.0}], [{"us": 0.0}], case)
    assert result["against"]["ratio"] == {}
    assert result["against"]["difference"]["us"]["median"] == 1.0
    assert list(result["figures"]) == ["us", "mine"]


def test_a_goal_for_an_unknown_figure_is_named():
    with pytest.raises(b.BenchmarkError, match="Did you mean 'us_per_step'"):
        b.compare([{"us_per_step": 1.0}], None, b.Case("a", ("x",), None, {"value": {"us_per_stp": 3.0}}))


@pytest.mark.parametrize("output", ["", "text", "[1]", '{"a": "b"}', '{"a": NaN}', '{"a": true}'])
def test_a_case_without_figures_is_named(output):
    with pytest.raises(b.BenchmarkError, match="'mine' printed no line of JSON"):
        b._figures(output, "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["cases"]["ours"].update(pair="thiers"), "Did you mean 'theirs'"),
        (lambda c: c["cases"]["ours"].update(pair="ours"), "no other case"),
        (lambda c: c["cases"]["ours"].update(python="m:f"), "either command or python"),
        (lambda c: c["cases"]["ours"].update(comand="x"), "Did you mean 'command'"),
        (lambda c: c["cases"]["ours"].update(args={"a": 1}), "args belong to python"),
        (lambda c: c["cases"]["ours"].update(goals={"ration": {}}), "Did you mean 'ratio'"),
        (lambda c: c["cases"]["theirs"].update(python="m.f"), "module:function"),
        (lambda c: c["cases"]["theirs"].update(goals={"ratio": {"us": 1}}), "needs a pair"),
        (lambda c: c.update(repeats=0), "at least 1"),
        (lambda c: c.update(cases={}), "cases is empty"),
        (lambda c: c.update(case={}), "Did you mean 'cases'"),
    ],
)
def test_mistakes(tmp_path, change, message):
    content = two_cases()
    change(content)
    with pytest.raises(b.BenchmarkError, match=message):
        b.Benchmark.read(write(tmp_path / "b.yaml", content))
    assert issubclass(b.BenchmarkError, UserError)


def test_only_keeps_the_pair(tmp_path):
    read = b.Benchmark.read(write(tmp_path / "b.yaml", two_cases()))
    assert [*read.only("ours").cases] == ["ours", "theirs"]
    assert [*read.only("theirs").cases] == ["theirs"]
    with pytest.raises(b.BenchmarkError, match="Did you mean 'ours'"):
        read.only("our")


def test_processes_run_functions_and_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(n):\n    print('on the way')\n    return {'n': n + 1}\n")
    (tmp_path / "bad.py").write_text("raise SystemExit('broken')\n")
    content = {
        "repeats": 1,
        "cases": {
            "function": {"python": "mine:f", "args": {"n": 3}},
            "command": {"command": ["python", "-c", "import os; print('{\"t\":', os.environ['OMP_NUM_THREADS'], '}')"]},
        },
    }
    write(tmp_path / "b.yaml", content)
    assert b.main(["b.yaml", "--json", "out.json"]) == 0
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert cases["function"]["figures"]["n"]["values"] == [4.0]
    assert cases["command"]["figures"]["t"]["values"] == [1.0]
    with pytest.raises(b.BenchmarkError, match=r"(?s)'x' failed with exit status 1.*broken"):
        b._run_process(b.Case("x", (sys.executable, "bad.py")), 1)
    with pytest.raises(b.BenchmarkError, match="--repeats 0"):
        b.main(["b.yaml", "--repeats", "0"])


def test_percentile_by_hand():
    assert b.percentile([5, 1, 4, 2, 3], 0.2) == 2
    assert b.percentile([5, 1, 4, 2, 3], 0.0) == 1
    assert b.percentile([5, 1, 4, 2, 3], 1.0) == 5
    with pytest.raises(ValueError, match="0 values"):
        b.percentile([], 0.5)


def test_parts_by_hand():
    durations = {
        "[_TrainingEpochLoop].train_dataloader_next": [9.0, 1e-6],
        "[LightningDataModule]D.on_after_batch_transfer": [9.0, 2e-6],
        "[Strategy]SingleDeviceStrategy.training_step": [9.0, 10e-6],
        "[Strategy]SingleDeviceStrategy.backward": [9.0, 20e-6],
        "[LightningModule]M.optimizer_step": [9.0, 35e-6],
        "[Callback]EMATeacher.on_train_batch_end": [9.0, 4e-6],
        "[Callback]Throughput.on_train_batch_end": [9.0, 3e-6],
        "[Callback]Throughput.on_validation_end": [9.0, 99e-6],
        "[Strategy]SingleDeviceStrategy.validation_step": [9.0, 99e-6],
        "run_training_epoch": [9.0],
    }
    parts = b.time_parts(durations, skip=1)
    assert parts["data"] == 3
    assert parts["forward"] == 10
    assert parts["backward"] == 20
    assert parts["optimizer"] == 5
    assert parts["ema"] == 4
    assert parts["callbacks"] == 3


def test_parts_of_a_real_step(tmp_path):
    import torch
    from lightning.pytorch import LightningModule, Trainer

    class Tiny(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, _):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    timer = b.step_timer()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        profiler=timer,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Tiny(), torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=1))
    assert len(timer.durations["[Strategy]SingleDeviceStrategy.backward"]) == 8
    parts = b.time_parts(timer.durations)
    assert all(parts[name] > 0 for name in ("data", "forward", "backward", "optimizer", "step"))
    assert parts["step"] == pytest.approx(sum(v for k, v in parts.items() if k != "step"), abs=1)


def test_committed_benchmarks_are_right():
    for path in (ROOT / "configs" / "benchmarks").glob("*.yaml"):
        assert b.Benchmark.read(path).cases
