"""Many configs in several settings over seeds, and one table of them: ``python -m benchmarks.compare --help``.

Every run is an ordinary ``zoo fit``. The runs are forked from one process that has imported everything, so that a run
costs its training and no more; what has finished is not run again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SETTINGS = Path("configs/benchmarks/settings")
COLUMNS = {
    "last": "test/accuracy",
    "best on validation": "best/test/accuracy",
    "in use": "pseudo/utilization",
    "right": "pseudo/accuracy",
    "not adapted": "unadapted/accuracy",
    "averaged (SWAD)": "swad/test/accuracy",
}


def folder_of(root: Path, setting: str, config: Path, seed: int) -> Path:
    """Where a run is."""
    return root / setting / config.stem / f"seed_{seed}"


def train(config: Path, setting: str, seed: int, folder: Path, threads: int, changes: list[str]) -> None:
    """One run, in a process of its own; what it prints goes to ``folder/log.txt``."""
    import torch

    from zoo import cli

    with (folder / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        torch.set_num_threads(threads)
        arguments = ["fit", "-c", str(config), "-c", str(SETTINGS / f"{setting}.yaml")]
        arguments += ["--seed_everything", str(seed), "--data.seed", str(seed)]
        code = cli.main([*arguments, "--trainer.default_root_dir", str(folder), "--trainer.accelerator=cpu", *changes])
    os._exit(code)


def digest(config: Path, setting: str, changes: list[str]) -> str:
    """What a run is made from: another config or setting makes another run."""
    content = [config.read_text(), (SETTINGS / f"{setting}.yaml").read_text(), *changes]
    return hashlib.sha256("\0".join(content).encode()).hexdigest()


def finished(folder: Path) -> dict[str, float] | None:
    """What a run measured, or None."""
    with contextlib.suppress(OSError, ValueError):
        metrics: dict[str, float] = json.loads((folder / "metrics.json").read_text())["metrics"]
        return metrics if COLUMNS["last"] in metrics else None
    return None


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[Path, str, int, Path]]:
    """The runs that are still to be made, seed by seed: a stopped comparison has whole rows of the first seeds."""
    for seed in arguments.seeds:
        for setting in arguments.settings:
            for config in arguments.configs:
                folder = folder_of(arguments.runs, setting, config, seed)
                made_from, wanted = folder / "made_from", digest(config, setting, arguments.changes)
                if finished(folder) is None or not made_from.is_file() or made_from.read_text() != wanted:
                    yield config, setting, seed, folder


def run(arguments: argparse.Namespace) -> int:
    """Make the runs, ``arguments.jobs`` at a time; returns how many failed."""
    from zoo import cli

    cli.import_all()
    import callbacks.picture  # noqa: F401  (what every run needs is imported once, here)
    import zoo.core.backbones  # noqa: F401

    context, running, failed = get_context("fork"), [], 0
    for config, setting, seed, folder in [*jobs(arguments)]:
        while len([p for p in running if p[0].is_alive()]) >= arguments.jobs:
            time.sleep(0.2)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "made_from").write_text(digest(config, setting, arguments.changes))
        process = context.Process(
            target=train, args=(config, setting, seed, folder, arguments.threads, arguments.changes)
        )
        process.start()
        running.append((process, folder, time.time()))
    for process, folder, _ in running:
        process.join()
        if process.exitcode or finished(folder) is None:
            failed += 1
            print(f"failed: {folder} (see log.txt)", file=sys.stderr)
    return failed


def cell(values: list[float]) -> str:
    """Mean ± standard deviation of n − 1."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}".replace("0.", ".")


def table(arguments: argparse.Namespace, setting: str) -> str:
    """One row a config, the best ``last`` first, as Markdown."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for config in arguments.configs:
        runs = [finished(folder_of(arguments.runs, setting, config, seed)) for seed in arguments.seeds]
        if found := [metrics for metrics in runs if metrics is not None]:
            measured[config.stem] = found
    columns = {
        name: key for name, key in COLUMNS.items() if any(key in m for found in measured.values() for m in found)
    }
    rows: list[tuple[float, str]] = []
    for stem, found in measured.items():
        cells = [cell([m[key] for m in found if key in m]) for key in columns.values()]
        each = " ".join(f"{m[COLUMNS['last']]:.3f}".lstrip("0") for m in found)
        mean = statistics.mean(m[COLUMNS["last"]] for m in found)
        rows.append((mean, f"| {stem} | {each} | " + " | ".join(cells) + " |"))
    head = ["config", "seeds", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(row for _, row in sorted(rows, reverse=True))]
    return "\n".join(lines)


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", type=Path, help="configs of methods")
    parser.add_argument("--settings", nargs="+", default=["mnist5k_4"], help=f"names of files in {SETTINGS}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument(
        "--change", dest="changes", action="append", default=[], help="a further option of zoo fit: --change=--a.b=c"
    )
    parser.add_argument("--table", action="store_true", help="only print what has finished")
    arguments = parser.parse_args()
    for setting in arguments.settings:
        if not (SETTINGS / f"{setting}.yaml").is_file():
            known = ", ".join(sorted(path.stem for path in SETTINGS.glob("*.yaml")))
            parser.error(f"--settings: there is no {setting!r}, only {known}")
    failed = 0 if arguments.table else run(arguments)
    for setting in arguments.settings:
        print(f"\n{setting}\n\n{table(arguments, setting)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
