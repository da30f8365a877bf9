"""How a stage of a pipeline is run: in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FRONT = "zoo.__main__"  # its ``main`` is what a stage runs

Runner = Callable[[Sequence[str], Path], int]
"""Takes a command line and the run folder, leaves a ``log.txt`` there, returns the exit status."""


def in_new_process(command: Sequence[str], folder: Path) -> int:
    """Runs a stage in its own process; its output goes to ``log.txt``."""
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            return process.wait()
        finally:  # an interrupted pipeline leaves no training behind
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def in_fork(command: Sequence[str], folder: Path) -> int:
    """Runs a stage in a fork of this process, which has imported once what every stage needs: seconds a stage."""
    process = multiprocessing.get_context("fork").Process(target=_forked, args=(command, folder))
    sys.stdout.flush()
    process.start()
    try:
        process.join()
        return int(process.exitcode or 0)
    finally:  # an interrupted pipeline leaves no training behind
        if process.is_alive():
            process.terminate()
            process.join(30)
            process.kill()
            process.join()


def _forked(command: Sequence[str], folder: Path) -> None:
    """The forked process: as ``python -m zoo ...`` would have it, and what Lightning starts further ranks from."""
    _end_with_parent()
    to_log = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for wanted, path, flags in ((0, os.devnull, os.O_RDONLY), (1, folder / "log.txt", to_log)):
        opened = os.open(path, flags, 0o666)
        if opened != wanted:  # which it is where this process had closed its input or output
            os.dup2(opened, wanted)
            os.close(opened)
    os.dup2(1, 2)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in range(3))  # noqa: SIM115
    sys.argv[1:] = command[3:]
    random.seed()
    status: Any = 1
    try:
        status = importlib.import_module(FRONT).main()
    except SystemExit as leaves:
        status = leaves.code
    except BaseException:  # the log is where it is looked for
        traceback.print_exc()
    if isinstance(status, str):
        print(status, file=sys.stderr)  # noqa: T201
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))


def _end_with_parent() -> None:
    """A pipeline that is killed leaves no training behind that nobody waits for."""
    import fcntl  # where forks are

    parent = multiprocessing.parent_process()
    assert parent is not None
    # a number that input and output do not take
    alive = fcntl.fcntl(parent.sentinel, fcntl.F_DUPFD_CLOEXEC, 3)

    def wait() -> None:
        os.read(alive, 1)  # nothing is ever written: it returns when the parent's end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def fastest() -> Runner:
    """Forks where that is safe: no accelerator is in use by this process, and the system's libraries bear it."""
    if not sys.platform.startswith("linux"):
        return in_new_process
    from zoo import cli

    cli.import_all()
    for name in ("callbacks.picture", "zoo.core.backbones"):
        importlib.import_module(name)
    torch = sys.modules["torch"]
    return in_new_process if torch.cuda.is_initialized() else in_fork
