"""Timings that can be believed: every case in its own process, repeats interleaved, medians and ratios.

A benchmark is one YAML file::

    threads: 1
    repeats: 3
    cases:
      ours:
        python: benchmarks.step:trainer
        args: {network: mlp}
        pair: bare
        goals: {difference: {us_per_step: 500}}
      bare: {python: "benchmarks.step:bare", args: {network: mlp}}
      other: {command: python my_script.py}

A case is a Python function that returns figures, or a command whose last line of output is a JSON object of figures.
``pair`` names the case that it is compared with; repeats run A B A B, so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from zoo.core.errors import UserError, suggest

if TYPE_CHECKING:
    from lightning.pytorch.profilers import Profiler

__all__ = ["Benchmark", "BenchmarkError", "Case", "compare", "main", "percentile", "run", "step_timer", "time_parts"]

_KEYS = ("description", "threads", "repeats", "cases")
_CASE_KEYS = ("command", "python", "args", "pair", "goals")
_GOALS = ("ratio", "difference", "value")
_LAST_LINES = 15


class BenchmarkError(UserError):
    """The benchmark file is wrong, or a case gave no figures."""


@dataclass(frozen=True)
class Case:
    """One program to time.

    Args:
        name: of the case.
        command: the program and its arguments.
        pair: the case that this one is compared with.
        goals: what is hoped for at most: ``ratio``, ``difference`` (to the pair) or ``value``, each by figure.
    """

    name: str
    command: tuple[str, ...]
    pair: str | None = None
    goals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """Cases, and how they are run.

    Args:
        cases: name → case.
        repeats: runs of every case.
        threads: of PyTorch and OpenMP in every process.
    """

    cases: Mapping[str, Case]
    repeats: int = 3
    threads: int = 1

    @classmethod
    def read(cls, path: str | Path) -> Benchmark:
        """Reads and checks a file; nothing is run.

        Raises:
            BenchmarkError: naming what is wrong and the nearest right name.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise BenchmarkError(f"{path} cannot be read: {error}") from None
        content = _mapping(content, str(path), _KEYS)
        described = _mapping(content.get("cases"), f"{path}: cases")
        if not described:
            raise BenchmarkError(f"{path}: cases is empty")
        cases = {name: _case(name, body, f"{path}: cases.{name}") for name, body in described.items()}
        for case in cases.values():
            if case.pair is not None and (case.pair not in cases or case.pair == case.name):
                raise BenchmarkError(
                    f"{path}: cases.{case.name}.pair={case.pair!r} is no other case.{suggest(case.pair, cases)}"
                )
        repeats, threads = content.get("repeats", 3), content.get("threads", 1)
        for name, value in (("repeats", repeats), ("threads", threads)):
            if not isinstance(value, int) or value < 1:
                raise BenchmarkError(f"{path}: {name}={value!r} must be an integer, at least 1")
        return cls(cases, repeats, threads)

    def only(self, name: str) -> Benchmark:
        """One case with what it is compared with."""
        if name not in self.cases:
            raise BenchmarkError(f"--case {name}: unknown case.{suggest(name, self.cases)}")
        wanted = {name, self.cases[name].pair}
        return Benchmark({k: v for k, v in self.cases.items() if k in wanted}, self.repeats, self.threads)


def _mapping(value: Any, where: str, allowed: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BenchmarkError(f"{where} must be a mapping, got {type(value).__name__}")
    for key in value:
        if allowed and key not in allowed:
            raise BenchmarkError(
                f"{where}: unknown key {key!r}.{suggest(str(key), allowed)} Allowed: {', '.join(allowed)}"
            )
    return {str(key): item for key, item in value.items()}


def _case(name: str, body: Any, where: str) -> Case:
    body = _mapping(body, where, _CASE_KEYS)
    command, function = body.get("command"), body.get("python")
    if (command is None) == (function is None):
        raise BenchmarkError(f"{where}: give either command or python")
    arguments = _mapping(body.get("args") or {}, f"{where}.args")
    if function is not None:
        if not isinstance(function, str) or function.count(":") != 1:
            raise BenchmarkError(f"{where}.python={function!r} must be module:function")
        words = [sys.executable, "-m", "zoo.benchmark", "--call", function, json.dumps(arguments)]
    else:
        if arguments:
            raise BenchmarkError(f"{where}: args belong to python; write a command's own into it")
        words = [str(word) for word in command] if isinstance(command, list) else shlex.split(str(command))
        if words and words[0] == "python":
            words[0] = sys.executable
        if not words:
            raise BenchmarkError(f"{where}.command is empty")
    goals = _mapping(body.get("goals") or {}, f"{where}.goals", _GOALS)
    for kind, figures in goals.items():
        goals[kind] = {k: float(v) for k, v in _mapping(figures, f"{where}.goals.{kind}").items()}
        if kind != "value" and body.get("pair") is None:
            raise BenchmarkError(f"{where}.goals.{kind} needs a pair")
    return Case(name, tuple(words), body.get("pair"), goals)


# --- running ---------------------------------------------------------------------------------------------------------


def _run_process(case: Case, threads: int) -> str:
    environment = {
        "OMP_WAIT_POLICY": "passive",  # spinning threads would time the neighbours
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(case.command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-_LAST_LINES:])
        raise BenchmarkError(f"case {case.name!r} failed with exit status {done.returncode}:\n{tail}")
    return done.stdout


def _figures(output: str, case: str) -> dict[str, float]:
    """The last line that is a JSON object; only its numbers."""
    for line in reversed(output.splitlines()):
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(content, dict):
            numbers = {k: float(v) for k, v in content.items() if isinstance(v, (int, float)) and v is not True}
            if numbers and all(map(math.isfinite, numbers.values())):
                return numbers
            break
    raise BenchmarkError(f"case {case!r} printed no line of JSON with finite figures")


def run(
    benchmark: Benchmark,
    runner: Callable[[Case, int], str] = _run_process,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs all cases in turn, as often as asked, and compares pairs.

    Args:
        benchmark: as read by :meth:`Benchmark.read`.
        runner: runs one case and gives its output; tests give their own.
        console: where to report progress.

    Returns:
        ``{"machine": ..., "cases": {name: comparison}}``, each as :func:`compare` gives it.

    Raises:
        BenchmarkError: when a case fails or prints no figures.
    """
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in benchmark.cases}
    for repeat in range(benchmark.repeats):
        for case in benchmark.cases.values():
            if console is not None:
                console.print(f"{repeat + 1}/{benchmark.repeats} {case.name}", markup=False, highlight=False)
            measured[case.name].append(_figures(runner(case, benchmark.threads), case.name))
    return {
        "machine": {
            "platform": platform.platform(terse=True),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "threads": benchmark.threads,
            "repeats": benchmark.repeats,
        },
        "cases": {
            case.name: compare(measured[case.name], measured[case.pair] if case.pair else None, case)
            for case in benchmark.cases.values()
        },
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": [*values]}


def compare(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]] | None, case: Case
) -> dict[str, Any]:
    """Figures of a case, and their ratios and differences to the pair's, repeat by repeat.

    Args:
        ours: figures of every repeat.
        theirs: of the pair, in the same order.
        case: names the pair and the goals.

    Returns:
        ``{"figures": ..., "against": {"case", "ratio", "difference"}, "goals": [...]}``.
    """
    common = set.intersection(*(set(repeat) for repeat in ours))
    result: dict[str, Any] = {"figures": {k: _spread([r[k] for r in ours]) for k in ours[0] if k in common}}
    if theirs is not None:
        shared = [k for k in ours[0] if k in common and all(k in repeat for repeat in theirs)]
        pairs = {k: [(a[k], b[k]) for a, b in zip(ours, theirs, strict=True)] for k in shared}
        result["against"] = {
            "case": case.pair,
            "ratio": {k: _spread([a / b for a, b in v]) for k, v in pairs.items() if all(b != 0 for _, b in v)},
            "difference": {k: _spread([a - b for a, b in v]) for k, v in pairs.items()},
        }
    result["goals"] = []
    for kind, figures in case.goals.items():
        source = result["figures"] if kind == "value" else result.get("against", {}).get(kind, {})
        for name, limit in figures.items():
            if name not in source:
                raise BenchmarkError(
                    f"case {case.name!r}: a goal for {name!r}, which it does not print.{suggest(name, source)}"
                )
            median = source[name]["median"]
            result["goals"].append(
                {"kind": kind, "figure": name, "limit": limit, "median": median, "met": median <= limit}
            )
    return result


def _print(report: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"median (min-max) of {report['machine']['repeats']}, {report['machine']['threads']} thread(s)")
    for heading in ("case", "figure", "value", "ratio", "difference", "goal"):
        table.add_column(heading, justify="left" if heading in ("case", "figure", "goal") else "right")
    for name, case in report["cases"].items():
        against = case.get("against", {"case": None, "ratio": {}, "difference": {}})
        title = name if against["case"] is None else f"{name} / {against['case']}"
        for figure, spread in case["figures"].items():
            goals = [
                f"{g['kind']} ≤ {g['limit']:g}: {'met' if g['met'] else 'missed'}"
                for g in case["goals"]
                if g["figure"] == figure
            ]
            cells = [_cell(spread), _cell(against["ratio"].get(figure)), _cell(against["difference"].get(figure))]
            table.add_row(title, figure, *cells, ", ".join(goals))
            title = ""
        table.add_section()
    console.print(table)


def _cell(spread: Mapping[str, Any] | None) -> str:
    return "" if spread is None else f"{spread['median']:.4g} ({spread['min']:.4g}-{spread['max']:.4g})"


# --- helpers for the programs that are timed -------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie; the 20th percentile is robust against a busy neighbour.

    Raises:
        ValueError: for no values, or a share outside [0, 1].
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"percentile: {len(values)} values, share={share} must lie in [0, 1]")
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def step_timer() -> Profiler:
    """A Lightning profiler that keeps every duration: ``Trainer(profiler=step_timer())``, then :func:`time_parts`."""
    from lightning.pytorch.profilers import Profiler

    class StepTimer(Profiler):
        """Durations in seconds by the name of Lightning's action, in ``durations``."""

        def __init__(self) -> None:
            super().__init__()
            self.durations: dict[str, list[float]] = defaultdict(list)
            self._started: dict[str, float] = {}

        def start(self, action_name: str) -> None:
            self._started[action_name] = time.perf_counter()

        def stop(self, action_name: str) -> None:
            now = time.perf_counter()
            if action_name in self._started:
                self.durations[action_name].append(now - self._started.pop(action_name))

        def summary(self) -> str:
            return ""

    return StepTimer()


def _part(action: str) -> str | None:
    """The part of a step that one of Lightning's actions belongs to; None for what is not in a training step."""
    owner, _, hook = action.rpartition(".")
    if action.endswith("train_dataloader_next") or hook.endswith(("_batch_transfer", "batch_to_device")):
        return "data"
    if owner.startswith("[Strategy]"):
        return {"training_step": "forward", "backward": "backward"}.get(hook)
    if owner.startswith("[Callback]"):
        if not hook.startswith("on_train_batch") and hook not in (
            "on_before_zero_grad",
            "on_before_backward",
            "on_after_backward",
            "on_before_optimizer_step",
        ):
            return None
        return "ema" if "EMA" in owner else "callbacks"
    return "optimizer" if hook == "optimizer_step" else None


def time_parts(durations: Mapping[str, Sequence[float]], skip: int = 5) -> dict[str, float]:
    """The parts of a training step from what :func:`step_timer` has kept.

    On a GPU these are the host's times: what is queued, not what the device computes.

    Args:
        durations: action → seconds of each call.
        skip: first calls of each action that do not count.

    Returns:
        Microseconds per step (medians): data, forward, backward, optimizer (without forward and backward, which run
        inside its closure), ema, callbacks (without ema), other, and step, their sum.
    """

    def median(values: Sequence[float]) -> float:
        return statistics.median(values[skip:] if len(values) > skip else values) * 1e6

    parts = dict.fromkeys(("data", "forward", "backward", "optimizer", "ema", "callbacks"), 0.0)
    for action, values in durations.items():
        part = _part(action)
        if part is not None and values:
            parts[part] += median(values)
    parts["optimizer"] = max(parts["optimizer"] - parts["forward"] - parts["backward"], 0.0)
    inside = sum(value for name, value in parts.items() if name != "data")
    batch = durations.get("run_training_batch")
    parts["other"] = (
        max(median(batch) - parts["forward"] - parts["backward"] - parts["optimizer"], 0.0) if batch else 0.0
    )
    parts["step"] = parts["data"] + inside + parts["other"]
    return {name: round(value, 1) for name, value in parts.items()}


@contextlib.contextmanager
def _standard_output_for_figures() -> Iterator[None]:
    """Whatever a case prints on the way goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _call(target: str, arguments: str) -> int:
    """Runs one Python case in this process and prints its figures."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    module_name, _, name = target.partition(":")
    with _standard_output_for_figures():
        function = getattr(importlib.import_module(module_name), name)
        figures = function(**json.loads(arguments))
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """``zoo benchmark FILE [--case NAME] [--repeats N] [--json OUT]``.

    Raises:
        BenchmarkError: for what the user can mend; ``zoo`` exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) == 3 and argv[0] == "--call":
        return _call(argv[1], argv[2])
    parser = argparse.ArgumentParser(
        prog="zoo benchmark", description="Time the cases of a benchmark file.", allow_abbrev=False
    )
    parser.add_argument("file", help="a YAML file of cases, e.g. configs/benchmarks/core.yaml")
    parser.add_argument("--case", metavar="NAME", help="only this case and what it is compared with")
    parser.add_argument("--repeats", type=int, metavar="N", help="runs of every case")
    parser.add_argument("--json", metavar="OUT", help="write the figures here")
    options = parser.parse_args(argv)
    benchmark = Benchmark.read(options.file)
    if options.case is not None:
        benchmark = benchmark.only(options.case)
    if options.repeats is not None:
        if options.repeats < 1:
            raise BenchmarkError(f"--repeats {options.repeats} must be at least 1")
        benchmark = Benchmark(benchmark.cases, options.repeats, benchmark.threads)
    console = Console(width=None if sys.stdout.isatty() else 150)  # a file has room for whole cells
    report = run(benchmark, console=console)
    _print(report, console)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
