"""Where a run keeps its files: ``runs/NAME/`` with config.yaml, metrics.csv and checkpoints/."""

import csv
import os
import tempfile
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

from zoo import catalog
from zoo.core.errors import UserError, suggest

RUNS = Path("runs")
_CHOSEN = "ZOO_RUN_FOLDER"  # tells the processes that rank 0 starts which folder it chose


class RunLogger(CSVLogger):
    """``metrics.csv`` directly in the run folder; a resumed run goes on where the file ends.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__(save_dir=folder, name="", version="")

    @property
    def root_dir(self) -> str:
        """The run folder."""
        return self.save_dir

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return self.save_dir

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml says it all."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer, which deletes an existing file: keep its rows, on rank 0, which alone has the file."""
        if self._experiment is None:
            path, aside = (Path(self.log_dir) / name for name in ("metrics.csv", "metrics.csv.earlier"))
            if path.is_file():
                path.replace(aside)
            writer = super().experiment
            if aside.is_file():  # also where an earlier start was killed here
                aside.replace(path)
                with path.open(encoding="utf-8") as file:
                    writer.metrics_keys = next(csv.reader(file), [])
        return self._experiment


def is_taken(folder: Path) -> bool:
    """Whether a run has written into the folder."""
    return any((folder / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints"))


def claim(name: str, root: Path = RUNS) -> Path:
    """Make and return the first free one of ``root/name``, ``root/name-2``, ``root/name-3``, ...

    Raises:
        UserError: when the folder cannot be made or written.
    """
    if chosen := os.environ.get(_CHOSEN):
        return Path(chosen)
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) > 0:
        return root / name  # rank 0 chooses; Lightning broadcasts its paths
    number = 1
    while is_taken(folder := root / (name if number == 1 else f"{name}-{number}")):
        number += 1
    check_writable(folder)
    os.environ[_CHOSEN] = str(folder)
    return folder


def release() -> None:
    """Forget the chosen folder, so that the next run of this process chooses its own."""
    os.environ.pop(_CHOSEN, None)


def check_writable(folder: Path) -> None:
    """Make the folder and write to it once.

    Raises:
        UserError: before training rather than after the first epoch.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {folder}: {error.strerror}."
            " Choose another one with --trainer.default_root_dir"
        ) from error


def existing_checkpoint(path: str) -> Path:
    """The checkpoint file that the user named.

    Raises:
        UserError: when there is no such file, with the nearest one that exists.
    """
    if Path(path).is_file():
        return Path(path)
    known = [str(found) for found in catalog.checkpoints(limit=100)]
    known += [str(found) for found in Path(path).parent.glob("*.ckpt") if str(found) not in known]
    hint = suggest(path, known) or (f" Newest: {', '.join(known[:3])}" if known else "")
    raise UserError(f"--ckpt_path: no file {path!r}.{hint}")
