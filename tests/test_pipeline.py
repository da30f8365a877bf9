import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from zoo import pipeline as p
from zoo import stage_runners
from zoo.core.errors import UserError


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.yaml", {"trainer": {"max_epochs": 1}})
    return tmp_path


def three_stages(**more):
    return {
        "metric": "test/accuracy",
        "stages": {
            "student": {"config": "base.yaml", "overrides": {"model.init_args.labels": "${weak.predictions}"}},
            "weak": {"config": ["base.yaml"]},
            "ceiling": {"command": "fit", "config": ["base.yaml"], "overrides": {"model": {"init_args": {"depth": 3}}}},
        },
        "summary": {"pgr": "(student - weak)/(ceiling - weak)"},
        **more,
    }


class Runner:
    """Stands for training: leaves the files of a run; `fail` ends that stage with an error."""

    def __init__(self, scores=None, fail=()):
        self.calls, self.commands, self.fail = [], [], set(fail)
        self.scores = scores or {"weak": 0.5, "student": 0.6, "ceiling": 0.7}

    def __call__(self, command, folder):
        self.calls.append(folder.name)
        self.commands.append(list(command))
        (folder / "log.txt").write_text("first line\nthe last words\n")
        if folder.name in self.fail:
            return 3
        score = self.scores[folder.name]
        seed = int(folder.parent.name.removeprefix("seed_")) if folder.parent.name.startswith("seed_") else 0
        score = score(seed) if callable(score) else score
        (folder / "metrics.json").write_text(json.dumps({"test/accuracy": score, "test/loss": 1 - score}))
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").write_text(f"weights {score}")
        (folder / "predictions.csv").write_text(f"table {score}")
        (folder / "predictions.safetensors").write_text(f"predictions {score}")
        return 0


def go(content, runner, place, changes=(), **kwargs):
    read = p.Pipeline.read(write(place / "pipe.yaml", content), changes)
    with open(place / "out.txt", "a") as out:
        return p.run(read, runner, console=Console(file=out, width=200), **kwargs)


def test_stages_run_after_what_they_need_and_the_summary_is_right(place):
    runner = Runner()
    summary = go(three_stages(), runner, place)
    assert runner.calls == ["weak", "student", "ceiling"]
    assert summary["summary"]["pgr"]["mean"] == pytest.approx(0.5)
    assert summary["summary"]["pgr"]["std"] is None
    assert summary["stages"]["weak"]["values"] == [0.5]
    assert json.loads((place / "runs/pipe/summary.json").read_text()) == summary
    student = runner.commands[1]
    assert student[:4] == [sys.executable, "-m", "zoo", "fit"]
    assert "--model.init_args.labels=runs/pipe/weak/predictions.safetensors" in student
    assert "--trainer.default_root_dir=runs/pipe/student" in student
    assert not any(part.startswith("--seed_everything") for part in student)
    assert "--model.init_args.depth=3" in runner.commands[2]


def test_finished_stages_are_kept(place):
    go(three_stages(), Runner(), place)
    again = Runner()
    go(three_stages(), again, place)
    assert again.calls == []


def test_a_changed_override_runs_that_stage_and_what_its_outputs_change(place):
    go(three_stages(), Runner(), place)
    content = three_stages()
    content["stages"]["weak"]["overrides"] = {"trainer.max_epochs": 2}
    same_outputs = Runner()
    go(content, same_outputs, place)
    assert same_outputs.calls == ["weak"]  # what the student takes has the same content
    content["stages"]["weak"]["overrides"] = {"trainer.max_epochs": 3}
    other = Runner({"weak": 0.4, "student": 0.6, "ceiling": 0.7})
    go(content, other, place)
    assert other.calls == ["weak", "student"]


def test_a_changed_config_file_runs_again_but_a_comment_does_not(place):
    go(three_stages(), Runner(), place)
    (place / "base.yaml").write_text("# a remark\ntrainer: {max_epochs: 1}\n")
    comment = Runner()
    go(three_stages(), comment, place)
    assert comment.calls == []
    (place / "base.yaml").write_text("trainer: {max_epochs: 2}\n")
    value = Runner()
    go(three_stages(), value, place)
    assert value.calls == ["weak", "student", "ceiling"]


def test_a_lost_output_runs_again(place):
    go(three_stages(), Runner(), place)
    (place / "runs/pipe/ceiling/checkpoints/last.ckpt").unlink()
    runner = Runner()
    go(three_stages(), runner, place)
    assert runner.calls == ["ceiling"]


def test_a_failed_stage_names_itself_and_its_log_and_the_next_try_goes_on_there(place):
    with pytest.raises(p.StageFailedError, match=r"(?s)'student' failed with exit status 3.*the last words"):
        go(three_stages(), Runner(fail=["student"]), place)
    assert json.loads((place / "runs/pipe/student/stage.json").read_text())["status"] == "failed"
    runner = Runner()
    go(three_stages(), runner, place)
    assert runner.calls == ["student", "ceiling"]


def test_a_killed_stage_runs_again_without_its_half_written_outputs(place):
    class Killed(Runner):
        def __call__(self, command, folder):
            if folder.name == "student":
                (folder / "metrics.json").write_text('{"test/accuracy": 99}')
                raise KeyboardInterrupt
            return super().__call__(command, folder)

    with pytest.raises(KeyboardInterrupt):
        go(three_stages(), Killed(), place)

    class Watching(Runner):
        def __call__(self, command, folder):
            assert sorted(path.name for path in folder.iterdir()) == ["stage.json"]
            return super().__call__(command, folder)

    runner = Watching()
    summary = go(three_stages(), runner, place)
    assert runner.calls == ["student", "ceiling"]
    assert summary["stages"]["student"]["values"] == [0.6]


def test_foreign_files_are_never_removed(place):
    (place / "runs/pipe/weak").mkdir(parents=True)
    (place / "runs/pipe/weak/thesis.txt").write_text("mine")
    with pytest.raises(p.StageFailedError, match="no pipeline wrote"):
        go(three_stages(), Runner(), place)
    assert (place / "runs/pipe/weak/thesis.txt").read_text() == "mine"


def test_force(place):
    go(three_stages(), Runner(), place)
    runner = Runner()
    go(three_stages(), runner, place, force=["ceiling"])
    assert runner.calls == ["ceiling"]
    with pytest.raises(p.PipelineError, match=r"--force ceilin: unknown stage. Did you mean 'ceiling'"):
        go(three_stages(), runner, place, force=["ceilin"])


def test_seeds_give_rounds_with_mean_and_deviation(place):
    runner = Runner({"weak": 0.5, "student": lambda seed: 0.6 + 0.1 * seed, "ceiling": 0.7})
    summary = go(three_stages(seeds=[0, 1]), runner, place)
    assert runner.calls == ["weak", "student", "ceiling"] * 2
    assert "--seed_everything=1" in runner.commands[3]
    assert "--model.init_args.labels=runs/pipe/seed_1/weak/predictions.safetensors" in runner.commands[4]
    row = summary["summary"]["pgr"]
    assert row["values"] == pytest.approx([0.5, 1.0])
    assert row["mean"] == pytest.approx(0.75)
    assert row["std"] == pytest.approx(math.sqrt(0.125))
    assert row["count"] == 2
    more = Runner({"weak": 0.5, "student": 0.6, "ceiling": 0.7})
    go(three_stages(seeds=[0, 1, 2]), more, place)
    assert more.calls == ["weak", "student", "ceiling"]  # the finished seeds stay


def test_an_undefined_comparison_is_flagged_not_a_number(place):
    runner = Runner({"weak": 0.5, "student": 0.6, "ceiling": lambda seed: 0.5 + 0.2 * seed})
    summary = go(three_stages(seeds=[0, 1]), runner, place)
    row = summary["summary"]["pgr"]
    assert row["values"] == [None, pytest.approx(0.5)]
    assert row["count"] == 1
    assert row["undefined"] == {"seed 0": "division by zero"}
    assert "pgr is undefined for seed 0: division by zero" in (place / "out.txt").read_text()


def test_metrics_of_other_stages_are_values(place):
    content = three_stages()
    content["stages"]["student"]["overrides"] = {
        "model.threshold": "${weak.metrics[test/accuracy]}",
        "note": "from ${weak.run}",
        "ckpt_path": "${weak.checkpoint}",
        "seed_everything": "${seed}",
    }
    runner = Runner()
    go(content, runner, place)
    for part in (
        "--model.threshold=0.5",
        "--note=from runs/pipe/weak",
        "--ckpt_path=runs/pipe/weak/checkpoints/last.ckpt",
        "--seed_everything=0",
    ):
        assert part in runner.commands[1]


def test_best_checkpoint_goes_first(place):
    class Best(Runner):
        def __call__(self, command, folder):
            status = super().__call__(command, folder)
            (folder / "checkpoints" / "best.ckpt").write_text("best")
            return status

    content = three_stages()
    content["stages"]["student"]["overrides"] = {"ckpt_path": "${weak.checkpoint}"}
    runner = Best()
    go(content, runner, place)
    assert "--ckpt_path=runs/pipe/weak/checkpoints/best.ckpt" in runner.commands[1]


def test_a_missing_output_is_named(place):
    content = three_stages()
    content["stages"]["student"]["overrides"] = {"x": "${weak.metrics[test/acuracy]}"}
    with pytest.raises(p.StageFailedError, match="Did you mean 'test/accuracy'"):
        go(content, Runner(), place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["stages"]["student"].update(overrides={"x": "${weka.checkpoint}"}), "Did you mean 'weak'"),
        (lambda c: c["stages"]["student"].update(overrides={"x": "${weak.chekpoint}"}), "Did you mean 'checkpoint'"),
        (lambda c: c["stages"]["student"].update(overrides={"x": "${weak}"}), "not a reference"),
        (lambda c: c["stages"]["student"].update(overrides={"x": "${weak.metrics}"}), r"weak.metrics\[test/accuracy\]"),
        (lambda c: c["stages"]["student"].update(overrides={"x": ["${ceilign.run}"]}), "Did you mean 'ceiling'"),
        (lambda c: c["stages"]["weak"].update(overrides={"x": "${weak.run}"}), "circle: weak → weak"),
        (lambda c: c["stages"]["weak"].update(overrides={"x": "${student.run}"}), "circle: student → weak → student"),
        (lambda c: c["stages"]["weak"].update(config="bse.yaml"), "no file 'bse.yaml'. Did you mean 'base.yaml'"),
        (lambda c: c["stages"]["weak"].update(command="fti"), "Did you mean 'fit'"),
        (lambda c: c["stages"]["weak"].update(overides={}), "Did you mean 'overrides'"),
        (lambda c: c.update(seed=[0]), "Did you mean 'seeds'"),
        (lambda c: c.update(seeds=[0, 0]), "different integers"),
        (lambda c: c.update(seeds=["a"]), "different integers"),
        (lambda c: c.update(stages={}), "at least one stage"),
        (lambda c: c.update(stages=[1]), "must be a mapping"),
        (lambda c: c["stages"].update(trainer={}), "cannot be called 'trainer'"),
        (lambda c: c["summary"].update(x="studnt - weak"), "Did you mean 'student'"),
        (lambda c: c["summary"].update(weak="student"), "stage's name"),
        (lambda c: c["summary"].update(x="student -"), "not arithmetic"),
        (lambda c: c["summary"].update(x="__import__('os').system('true')"), "not allowed"),
        (lambda c: c["summary"].update(x="student.__class__"), "not allowed"),
        (lambda c: c["summary"].update(x="[1 for i in weak]"), "not allowed"),
        (lambda c: c["summary"].update(x="weak if student else 1"), "not allowed"),
        (lambda c: c["summary"].update(x="'a' * 10"), "not allowed"),
        (lambda c: c["summary"].update(x="abs()"), "not allowed"),
        (lambda c: c["summary"].update(x="abs(weak, 2)"), "abs takes 1, not 2"),
        (lambda c: c["summary"].update(x="ratio(weak)"), "ratio takes 2, not 1"),
        (lambda c: c["stages"].update(ratio={}), "cannot be called 'ratio'"),
        (lambda c: c["summary"].update(x="+".join(["1"] * 1000)), "longer than"),
    ],
)
def test_mistakes_are_found_before_anything_runs(place, change, message):
    content = three_stages()
    change(content)
    runner = Runner()
    with pytest.raises(p.PipelineError, match=message):
        go(content, runner, place)
    assert runner.calls == []
    assert issubclass(p.PipelineError, UserError)  # the front door exits with 2


def test_set_changes_one_stage_or_all(place):
    runner = Runner()
    changes = ["trainer.max_epochs=7", "weak.trainer.max_steps=3", "seeds=[5]", "root=elsewhere"]
    go(three_stages(), runner, place, changes=changes)
    assert all("--trainer.max_epochs=7" in command for command in runner.commands)
    assert sum("--trainer.max_steps=3" in command for command in runner.commands) == 1
    assert (place / "elsewhere/seed_5/weak/stage.json").is_file()
    for bad, message in (("weka.x=1", "Did you mean 'weak'"), ("x", "KEY=VALUE"), ("trainr.x=1", "'trainer'")):
        with pytest.raises(p.PipelineError, match=message):
            go(three_stages(), runner, place, changes=[bad])


def test_common_overrides_lose_against_the_stage(place):
    content = three_stages(overrides={"trainer.max_epochs": 9, "trainer.devices": 1})
    content["stages"]["weak"]["overrides"] = {"trainer": {"max_epochs": 2}}
    runner = Runner()
    go(content, runner, place)
    assert "--trainer.max_epochs=2" in runner.commands[0]
    assert "--trainer.devices=1" in runner.commands[0]
    assert "--trainer.max_epochs=9" in runner.commands[1]


def test_class_descriptions_stay_whole(place):
    content = three_stages()
    described = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1}}
    content["stages"]["weak"]["overrides"] = {"model": {"init_args": {"optimizer": described}}}
    runner = Runner()
    go(content, runner, place)
    assert f"--model.init_args.optimizer={json.dumps(described)}" in runner.commands[0]


def test_dry_run_touches_nothing(place):
    runner = Runner()
    go(three_stages(seeds=[0, 1]), runner, place, dry_run=True)
    assert runner.calls == []
    assert not (place / "runs").exists()
    text = (place / "out.txt").read_text()
    assert text.count("would run") == 6
    assert "${weak.predictions}" in text


def test_dry_run_after_a_run_says_what_is_kept(place):
    go(three_stages(), Runner(), place)
    go(three_stages(), Runner(), place, dry_run=True, force=["weak"])
    plan = (place / "out.txt").read_text().split("runs/pipe/summary.json")[-1]
    assert plan.count("would run") == 2  # the student may have to
    assert plan.count("finished, kept") == 1


def test_two_pipelines_in_one_folder_are_refused(place):
    def inner(command, folder):
        go(three_stages(), Runner(), place)
        return 0

    with pytest.raises(p.PipelineError, match="another pipeline"):
        go(three_stages(), inner, place)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("(s - w) / (c - w)", 0.5),
        ("s['test/loss']", 7.0),
        ("-s ** 2", -9.0),
        ("max(s, w, 10)", 10.0),
        ("min(s)", 3.0),
        ("sqrt(w + 3)", 2.0),
        ("100 * abs(w - c)", 400.0),
        ("ratio(s - w, c - w)", 0.5),
        ("ratio(w - s, c - w)", -0.5),
    ],
)
def test_evaluate_by_hand(expression, expected):
    values = {("s", None): 3, ("w", None): 1, ("c", None): 5, ("s", "test/loss"): 7}
    assert p.evaluate(expression, lambda name, metric: values[name, metric]) == (expected, "")


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("s / (w - w)", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(-2) ** 0.5", "root of a negative"),
        ("sqrt(-1)", ""),
        ("9 ** 9 ** 9 ** 9", ""),
        ("1e308 * 10", "not a finite"),
        ("ratio(1, 0)", "the whole is not positive"),
        ("ratio(1, -2)", "the whole is not positive"),
        ("ratio(1, 1e308 * 10 - 1e308 * 10)", "the whole is not positive"),
    ],
)
def test_evaluate_undefined_is_nan_with_a_reason(expression, why):
    value, reason = p.evaluate(expression, lambda *_: 1.0)
    assert math.isnan(value)
    assert reason
    assert why in reason


def test_summary_may_build_on_earlier_lines_and_other_metrics(place):
    content = three_stages()
    content["summary"] = {"gap": "ceiling - weak", "half": "gap / 2", "loss": "${weak.metrics[test/loss]} * 2"}
    summary = go(content, Runner(), place)
    assert summary["summary"]["half"]["mean"] == pytest.approx(0.1)
    assert summary["summary"]["loss"]["mean"] == pytest.approx(1.0)


def gap(**more):
    described = {"weak": "weak", "ceiling": "ceiling", "students": ["student"]}
    return three_stages(seeds=[0, 1, 2], gap_recovered={"four_pixels": described | more})


def with_seeds(student=0.6, weak=0.5):
    return Runner({"weak": lambda s: weak + 0.01 * s, "student": lambda s: student + 0.02 * s, "ceiling": 0.7})


def test_gap_recovered_has_raw_scores_an_interval_and_its_rounds(place):
    summary = go(gap(), with_seeds(), place)["gap_recovered"]["four_pixels"]["test/accuracy"]
    assert summary["weak"]["mean"] == pytest.approx(0.51)
    row = summary["students"]["student"]
    assert row["mean"] == pytest.approx(0.62)
    assert row["pgr"] == pytest.approx((0.62 - 0.51) / (0.7 - 0.51))  # a ratio of means
    assert row["per_round"] == pytest.approx([0.5, 0.11 / 0.19, 0.12 / 0.18], abs=1e-9)
    assert row["interval"][0] < row["pgr"] < row["interval"][1]
    assert (row["rounds"], row["reason"]) == (3, "")
    out = (place / "out.txt").read_text()
    assert "gap recovered, four_pixels" in out
    assert f"{row['interval'][0]:+.3f}" in out


def test_gap_recovered_is_flagged_where_the_ceiling_does_not_clear_the_weak_model(place):
    summary = go(gap(min_gap=0.3), with_seeds(), place)["gap_recovered"]["four_pixels"]["test/accuracy"]
    row = summary["students"]["student"]
    assert row["pgr"] is row["interval"] is None
    assert "does not clear the weak model" in row["reason"]
    assert row["mean"] == pytest.approx(0.62)
    assert "NaN *" in (place / "out.txt").read_text()
    json.loads((place / "runs/pipe/summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_gap_recovered_of_several_metrics_with_controls_and_arithmetic(place):
    content = gap(
        students=["student"],
        controls=["weak"],
        weak="max(weak, weak)",
        metrics={"test/loss": "lower", "test/accuracy": "higher", "test/other": "higher"},
    )
    found = go(content, with_seeds(), place)["gap_recovered"]["four_pixels"]
    assert found["test/loss"]["students"]["student"]["pgr"] == pytest.approx(
        found["test/accuracy"]["students"]["student"]["pgr"]
    )
    assert found["test/accuracy"]["controls"]["weak"]["pgr"] == 0
    missing = found["test/other"]["students"]["student"]
    assert missing["pgr"] is None
    assert "reported no 'test/other'" in missing["reason"]
    assert "weak (control)" in (place / "out.txt").read_text()


def test_an_anchor_of_a_gap_may_be_another_metric_of_a_stage(place):
    found = go(gap(weak="${weak.metrics[test/loss]}"), with_seeds(), place)["gap_recovered"]["four_pixels"]
    assert found["test/accuracy"]["weak"]["mean"] == pytest.approx(0.49)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weak": ""}, "gap_recovered.four_pixels: weak is missing"),
        ({"students": []}, "students is empty"),
        ({"students": "student"}, "students='student' must be a list"),
        ({"students": ["studnet"]}, "unknown stage 'studnet'. Did you mean 'student'"),
        ({"controls": ["student"]}, "student cannot be student and control"),
        ({"metrics": {"test/accuracy": "up"}}, "must be names with 'higher' or 'lower'"),
        ({"min_gap": -1}, "min_gap=-1 must be a number"),
        ({"minimum": 1}, "unknown key 'minimum'"),
        ({"ceiling": "__import__('os')"}, "is not allowed"),
    ],
)
def test_gap_recovered_mistakes(place, more, message):
    with pytest.raises(p.PipelineError) as caught:
        go(gap(**more), Runner(), place)
    assert message in str(caught.value)


def test_a_new_process_writes_the_log_and_gets_the_environment(place, monkeypatch):
    monkeypatch.setenv("LABELIGHT_TEST", "passed on")
    (place / "run").mkdir()
    code = "import os, sys; print(os.environ['LABELIGHT_TEST']); sys.exit(4)"
    assert stage_runners.in_new_process([sys.executable, "-c", code], place / "run") == 4
    assert (place / "run/log.txt").read_text() == "passed on\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.parametrize(
    ("body", "status", "log"),
    [
        ("print(sys.argv[1:], os.environ['LABELIGHT_TEST'], sys.stdin.read()); return 0", 0, "['fit', '-x'] passed on"),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no such file')", 1, "no such file"),
        ("raise KeyError('what')", 1, "KeyError: 'what'"),
        ("os.kill(os.getpid(), 9)", -9, ""),
        ("return 2", 2, ""),
    ],
)
def test_a_fork_writes_the_log_and_returns_the_status(place, monkeypatch, body, status, log):
    monkeypatch.setenv("LABELIGHT_TEST", "passed on")
    (place / "run").mkdir()
    (place / "front.py").write_text(f"import os, sys\ndef main():\n    {body}\n")
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(stage_runners, "FRONT", "front")
    monkeypatch.delitem(sys.modules, "front", raising=False)
    before = [*sys.argv]
    assert stage_runners.in_fork([sys.executable, "-m", "zoo", "fit", "-x"], place / "run") == status
    assert log in (place / "run/log.txt").read_text()
    assert sys.argv == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.parametrize("closed", [[0], [1], [0, 1, 2]])
def test_a_fork_has_input_and_output_where_this_process_has_none(place, closed):
    (place / "run").mkdir()
    (place / "front.py").write_text("import sys\ndef main():\n    print('heard', repr(sys.stdin.read())); return 0\n")
    code = f"""
import os, sys
sys.path.insert(0, {str(place)!r})
from zoo import stage_runners
stage_runners.FRONT = "front"
for fd in {closed}:
    os.close(fd)
os._exit(stage_runners.in_fork([sys.executable, "-m", "zoo", "fit"], stage_runners.Path("run")))
"""
    root = str(Path(p.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, check=False)
    assert done.returncode == 0
    assert (place / "run/log.txt").read_text() == "heard ''\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.parametrize("closed", [[], [0, 1, 2]])
def test_a_fork_ends_with_a_pipeline_that_is_killed(place, closed):
    (place / "run").mkdir()
    (place / "front.py").write_text(
        "import os, pathlib, time\n"
        "def main():\n    pathlib.Path('half').write_text(str(os.getpid()))\n    os.replace('half', 'pid')\n"
        "    time.sleep(100)\n"
    )
    code = f"""
import os, sys
sys.path.insert(0, {str(place)!r})
from zoo import stage_runners
stage_runners.FRONT = "front"
for fd in {closed}:
    os.close(fd)
stage_runners.in_fork([sys.executable, "-m", "zoo", "fit"], stage_runners.Path("run"))
"""
    root = str(Path(p.__file__).parents[1])
    pipeline = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root})
    for _ in range(600):
        if (place / "pid").exists():
            break
        time.sleep(0.1)
    stage = Path("/proc", (place / "pid").read_text(), "stat")
    pipeline.kill()
    pipeline.wait()
    for _ in range(600):
        if not stage.exists() or stage.read_text().rsplit(")", 1)[1].split()[0] == "Z":  # nobody need have reaped it
            break
        time.sleep(0.1)
    else:
        os.kill(int(stage.parent.name), 9)
        pytest.fail("the stage goes on")


def test_no_fork_where_an_accelerator_is_in_use_or_the_system_bears_none(monkeypatch):
    import torch

    from zoo import cli

    monkeypatch.setattr(cli, "import_all", lambda: None)
    monkeypatch.setattr(sys, "platform", "linux")
    assert stage_runners.fastest() is stage_runners.in_fork
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert stage_runners.fastest() is stage_runners.in_new_process
    monkeypatch.setattr(sys, "platform", "darwin")
    assert stage_runners.fastest() is stage_runners.in_new_process


def test_main_leaves_with_one_after_a_failed_stage(place, monkeypatch, capsys):
    write(place / "pipe.yaml", three_stages())

    def failing(pipeline, **_):
        raise p.StageFailedError("stage 'weak' failed")

    monkeypatch.setattr(p, "run", failing)
    with pytest.raises(SystemExit) as exit_:
        p.main(["pipe.yaml"])
    assert exit_.value.code == 1
    assert "stage 'weak' failed" in capsys.readouterr().err


def test_the_front_door_leaves_with_two_for_a_misspelt_stage(place, capsys):
    from zoo.__main__ import main

    content = three_stages()
    content["stages"]["student"]["overrides"] = {"x": "${weka.run}"}
    write(place / "pipe.yaml", content)
    assert main(["pipeline", "pipe.yaml"]) == 2
    assert "Did you mean 'weak'" in capsys.readouterr().err


def test_committed_pipelines_are_right(monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    for path in (root / "configs" / "pipelines").glob("*.yaml"):
        assert p.Pipeline.read(path).stages


@pytest.mark.slow
def test_a_real_pipeline_trains_tests_and_is_kept(place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    model = {"class_path": "Supervised", "init_args": {"network": {"class_path": "Network"}}}
    model["init_args"]["network"]["init_args"] = {"backbone": "lenet", "in_channels": 1, "image_size": 28}
    data = {"class_path": "SemiSupervisedData", "init_args": {"labels_per_class": 2, "batch_size": 4, "steps": 2}}
    data["init_args"]["source"] = {"class_path": "Blobs", "init_args": {"size": 28}}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    write(place / "tiny.yaml", {"model": model, "data": data, "trainer": trainer})
    content = {
        "seeds": [0],
        "stages": {
            "train": {"config": "tiny.yaml"},
            "score": {"command": "test", "config": "tiny.yaml", "overrides": {"ckpt_path": "${train.checkpoint}"}},
        },
        "summary": {"error": "1 - score"},
    }
    write(place / "pipe.yaml", content)
    subprocess.run([sys.executable, "-m", "zoo", "pipeline", "pipe.yaml"], check=True)
    summary = json.loads((place / "runs/pipe/summary.json").read_text())
    (accuracy,) = summary["stages"]["score"]["values"]
    assert summary["summary"]["error"]["mean"] == pytest.approx(1 - accuracy)
    again = Runner()
    go(content, again, place)
    assert again.calls == []
