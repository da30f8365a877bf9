"""What spans processes: the same weights from two ranks as from one, sharded or not, interrupted or not."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import EMATeacher
from zoo import FixMatch, Method, Network, cli
from zoo.policies import MovingAlignment, Threshold

STEPS = 3


def batches(rows: slice) -> list[dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def views() -> Tensor:
        return torch.randn(8, 1, 8, 8, generator=generator)

    items = []
    for _ in range(STEPS):
        labeled = {"image": views(), "label": torch.randint(3, (8,), generator=generator)}
        unlabeled = {"weak": views(), "strong": views()}
        items.append(
            {
                r: {k: v[rows] for k, v in d.items()}
                for r, d in zip(("labeled", "unlabeled"), (labeled, unlabeled), strict=True)
            }
        )
    return items


def fixmatch() -> FixMatch:
    torch.manual_seed(0)
    return FixMatch(
        network=partial(Network, backbone="tiny_mlp", in_channels=1),
        num_classes=3,
        policy=partial(Threshold, threshold=0.34, alignment=MovingAlignment),
        momentum=0.5,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    )


def fit(rows: slice, **arguments) -> tuple[FixMatch, Trainer]:
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[EMATeacher()], **arguments,
    )  # fmt: skip
    method = fixmatch()
    trainer.fit(method, DataLoader(batches(rows), batch_size=None))
    return method, trainer


@pytest.fixture(scope="module")
def joint() -> dict[str, Tensor]:
    """The weights of one process on the joint batch."""
    return fit(slice(None), devices=1)[0].state_dict()


def sharded_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    method, _ = fit(slice(rank * 4, rank * 4 + 4), devices=2, strategy=strategy)
    kinds = {type(p).__name__ for p in method.parameters()}
    state = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in method.state_dict().items()}
    torch.save({"kinds": sorted(kinds), "state": state}, f"{folder}/{rank}.pt")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_sharding_gives_the_weights_of_one_process(joint, tmp_path) -> None:
    port = free_port()
    torch.multiprocessing.start_processes(sharded_rank, (port, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert saved["kinds"] == ["DTensor"]
        assert saved["state"].keys() == joint.keys()
        for name, value in joint.items():
            torch.testing.assert_close(saved["state"][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_two_ranks_give_the_weights_of_one_process(joint, tmp_path) -> None:
    class Rank(DataLoader):
        """Each rank's rows, chosen when the rank iterates."""

        def __iter__(self):
            rank = torch.distributed.get_rank()
            return iter(batches(slice(rank * 4, rank * 4 + 4)))

    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=STEPS, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[EMATeacher()],
    )  # fmt: skip
    method = fixmatch()
    method.configure_model()  # a forked child's modules do not come back, their weights do
    trainer.fit(method, Rank(range(STEPS), batch_size=None))
    for name, value in joint.items():
        torch.testing.assert_close(method.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


# --- the command line -------------------------------------------------------------------------------------------------

# Without random views, two ranks with half a batch each see what one process sees with the whole batch.
CONFIG = """
model:
  class_path: Supervised
  init_args:
    network: {class_path: Network, init_args: {backbone: tiny_mlp, in_channels: 1}}
    momentum: 0.9
data:
  class_path: SupervisedData
  init_args:
    source: Blobs
    num_labels: 60
    batch_size: 8
    steps: 3
    val_size: 20
    weak: {class_path: Weak, init_args: {flip: false, crop_padding: 0.0}}
trainer:
  max_epochs: 2
  accelerator: cpu
  devices: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""
# Everything random that a method can have: views, dropout, shuffling, a teacher, a schedule.
RANDOM_CONFIG = """
model:
  class_path: FixMatch
  init_args:
    network: {class_path: Network, init_args: {backbone: tiny_mlp, in_channels: 1, dropout: 0.2}}
    scheduler: {class_path: CosineLR, init_args: {total_steps: 20}}
data:
  class_path: SemiSupervisedData
  init_args: {source: Blobs, num_labels: 24, batch_size: 8, steps: 3, val_size: 20}
trainer:
  max_epochs: -1
  max_steps: 8
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {class_path: zoo.core.checkpoint_io.RunCheckpoint, init_args: {every_n_steps: 2}}
"""
# `kill -9` of the own process at a step, after its checkpoint or while that is being written.
KILLER = """
import os, signal
from lightning.pytorch import Callback

class Killer(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5 and os.environ["KILLED"] == "between checkpoints":
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_step == 4 and os.environ["KILLED"] == "while saving":
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


def zoo(*arguments: Any, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command of a process that runs ``zoo``."""
    return [sys.executable, *launcher, "-m", "zoo", *map(str, arguments)]


def family(pid: int) -> list[int]:
    """A process and those that it has started, which torchrun puts into sessions of their own."""
    children = [
        int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
    ]
    return [pid, *(one for child in children for one in family(child))]


def run(*processes: list[str], folder: Path, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Run processes at once until all have ended; those that hang tell where."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "ZOO_RUN_FOLDER")
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | environment
    logs = [folder / f"output_{number}.txt" for number in range(len(processes))]
    started = [
        subprocess.Popen(p, cwd=folder, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for p, log in zip(processes, logs, strict=True)
    ]
    deadline = time.monotonic() + 240
    try:
        while any(p.poll() is None for p in started):
            if time.monotonic() > deadline:
                for pid in [pid for p in started for pid in reversed(family(p.pid))]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGABRT)  # it writes its stacks
                time.sleep(3)
                told = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)
                raise TimeoutError(f"{[p.poll() for p in started]} after 240 s\n{told}")
            time.sleep(0.1)
    finally:
        for pid in [pid for p in started if p.poll() is None for pid in family(p.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return [
        subprocess.CompletedProcess(p.args, p.wait(), log.read_text()) for p, log in zip(started, logs, strict=True)
    ]


def succeeded(*processes: list[str], folder: Path) -> None:
    """Run them; if one fails, all tell what they printed."""
    finished = run(*processes, folder=folder)
    assert all(done.returncode == 0 for done in finished), "\n---\n".join(done.stdout for done in finished)


def fit_here(*arguments: Any) -> None:
    assert cli.main(["fit", *map(str, arguments)]) == 0


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(last(folder), weights_only=True)["state_dict"]


def accuracy(folder: Path) -> float:
    return json.loads((folder / "metrics.json").read_text())["metrics"]["val/accuracy"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The run of one process on the joint batch."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "tiny.yaml").write_text(CONFIG)
    fit_here("-c", folder / "tiny.yaml", f"--trainer.default_root_dir={folder / 'run'}")
    return folder / "run"


def assert_same_run(found: Path, expected: Path) -> None:
    """Equal weights, and the checkpoint reloads: so every rank has brought its half of each batch."""
    theirs = weights(expected)
    loaded = Method.load_from_checkpoint(last(found)).state_dict()
    assert weights(found).keys() == loaded.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert accuracy(found) == pytest.approx(accuracy(expected), abs=1e-6)
    assert json.loads((found / "metrics.json").read_text())["steps"] == 6


def typed(root: Path, config: str, *more: str) -> list[str]:
    """A run of two ranks with a config of configs/run, on this machine's processor."""
    return ["-c", "tiny.yaml", "-c", str(root / "configs/run" / config), "--trainer.accelerator=cpu", *more,
            "--data.batch_size=4"]  # fmt: skip


def test_ddp_config_equals_one_process(one_process, tmp_path, root) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    succeeded(zoo("fit", *typed(root, "ddp.yaml")), folder=tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]
    assert_same_run(tmp_path / "runs/tiny", one_process)


def test_two_nodes_equal_one_process(one_process, tmp_path, root) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    port = str(free_port())
    nodes = [
        ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", rank,
         "--master_addr", "127.0.0.1", "--master_port", port)
        for rank in ("0", "1")
    ]  # fmt: skip
    arguments = typed(root, "multi_node.yaml", "--trainer.devices=1")
    succeeded(*(zoo("fit", *arguments, launcher=node) for node in nodes), folder=tmp_path)
    assert_same_run(tmp_path / "runs/tiny", one_process)


def test_fsdp2_config_equals_one_process_and_resumes(one_process, tmp_path, root) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    counted = ["--trainer.max_epochs=-1", "--trainer.max_steps=4"]
    succeeded(zoo("fit", *typed(root, "fsdp2.yaml", *counted)), folder=tmp_path)
    succeeded(zoo("fit", "--ckpt_path=runs/tiny/checkpoints/last.ckpt", "--trainer.max_steps=6"), folder=tmp_path)
    assert_same_run(tmp_path / "runs/tiny", one_process)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Tensor]:
    """The weights of a run in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "random.yaml").write_text(RANDOM_CONFIG)
    fit_here("-c", folder / "random.yaml", f"--trainer.default_root_dir={folder / 'run'}")
    return weights(folder / "run")


def assert_exact(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("moment", "step"), [("between checkpoints", 4), ("while saving", 3)])
def test_killed_run_resumes_exactly(uninterrupted, tmp_path, moment, step) -> None:
    (tmp_path / "own_killer.py").write_text(KILLER)
    (tmp_path / "random.yaml").write_text(RANDOM_CONFIG.replace("callbacks:", "callbacks:\n    - own_killer.Killer"))
    arguments = zoo("fit", "-c", "random.yaml", "--name=x")
    (killed,) = run(arguments, folder=tmp_path, KILLED=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    folder = tmp_path / "runs/x"
    # step 3 ended the first epoch; step 4's file was not renamed
    assert torch.load(last(folder), weights_only=True)["global_step"] == step
    (resumed,) = run(zoo("fit", "--ckpt_path=runs/x/checkpoints/last.ckpt"), folder=tmp_path, KILLED="no")
    assert resumed.returncode == 0, resumed.stdout
    assert_exact(weights(folder), uninterrupted)
    assert sorted(path.name for path in last(folder).parent.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("validates", [True, False])
def test_stops_anywhere_add_up_to_the_run_in_one_go(uninterrupted, tmp_path, validates) -> None:
    """Within an epoch, at its end, and twice in one epoch."""
    (tmp_path / "random.yaml").write_text(RANDOM_CONFIG)
    arguments = [f"--trainer.default_root_dir={tmp_path / 'run'}", f"--trainer.limit_val_batches={int(validates)}"]
    arguments += ["--trainer.callbacks=RunCheckpoint"]
    fit_here("-c", tmp_path / "random.yaml", *arguments, "--trainer.max_steps=1")
    for steps in (2, 3, 5, 8):
        fit_here("--ckpt_path", last(tmp_path / "run"), f"--trainer.max_steps={steps}")
        assert torch.load(last(tmp_path / "run"), weights_only=True)["global_step"] == steps
    assert_exact(weights(tmp_path / "run"), uninterrupted)


def test_more_epochs_add_up_to_the_run_in_one_go(one_process, tmp_path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    fit_here("-c", tmp_path / "tiny.yaml", f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_epochs=1")
    fit_here("--ckpt_path", last(tmp_path / "run"), "--trainer.max_epochs=2")
    assert_exact(weights(tmp_path / "run"), weights(one_process))
