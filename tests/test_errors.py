"""What users do wrong and what machines do to them: exit code 2 and one message that says what to do."""

import errno
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from zoo import run_folder
from zoo.__main__ import main
from zoo.core import checkpoint_io

CONFIG = """
model:
  class_path: Supervised
  init_args:
    network: {class_path: Network, init_args: {backbone: tiny_mlp, in_channels: 1}}
data:
  class_path: SupervisedData
  init_args:
    source: {class_path: Blobs, init_args: {num_classes: 3, samples: 60}}
    labels_per_class: 8
    batch_size: 8
    steps: 3
    val_size: 9
trainer:
  max_epochs: 2
  accelerator: cpu
  devices: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""
# From step 4 on the loss is not a number, as if a sample had brought an infinity.
POISON = """
from lightning.pytorch import Callback

class Poison(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 4:
            batch["labeled"]["image"].fill_(float("nan"))
"""
LAST = Path("runs/tiny/checkpoints/last.ckpt")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with one config, ``tiny.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    yield tmp_path
    run_folder.release()


@pytest.fixture
def refused(here, capsys):
    """Run a command that must end with 2, and return its one message."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main(list(argv)) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert f"\n{error}".count("\nzoo: ") == 1, error
        return error.rpartition("zoo: ")[2]

    return run


def fit(*more: str) -> list[str]:
    return ["fit", "-c", "tiny.yaml", *more]


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


# --- known before training --------------------------------------------------------------------------------------------

BEFORE = {
    "missing folder": (
        ["--data.source=ImageFolder", "--data.source.root=nowhere", "--data.source.channels=1"],
        ["ImageFolder", "nowhere"],
    ),
    "missing folder of a known set": (
        ["--data.source=FashionMNIST", "--data.source.root=nowhere", "--data.source.download=false"],
        ["FashionMNIST", "nowhere"],
    ),
    "class with too few labels": (
        ["--data.labels_per_class=50"],
        ["SupervisedData: labels_per_class=50, but class 0 (blob 0) has only"],
    ),
    "batch larger than the labelled set": (
        ["--data.batch_size=25"],
        ["a batch of 25 is larger than the 24 samples of the role 'labeled'", "allow_repeats"],
    ),
    "validation that leaves nothing": (["--data.val_size=60"], ["val_size=60 leaves nothing"]),
    "fewer labels than classes": (
        ["--data.labels_per_class=null", "--data.num_labels=2"],
        ["SupervisedData: num_labels=2 must be at least 3", "a class without any label"],
    ),
    "more labels than there are": (
        ["--data.labels_per_class=null", "--data.num_labels=100"],
        ["num_labels=100, but class"],
    ),
    "a value that the method itself refuses": (
        ["--model=MeanTeacher", "--model.ramp=2", "--data=SemiSupervisedData", "--data.unlabeled_ratio=2"],
        ["MeanTeacher: ramp=2", "[0, 1]"],
    ),
    "a choice that there is not": (
        ["--model=MeanTeacher", "--model.teacher_mode=trian", "--data=SemiSupervisedData"],
        ["'teacher_mode' must be 'eval' or 'train', got 'trian'", "Did you mean 'train'?"],
    ),
    "threshold outside (0, 1]": (
        [
            "--model=FixMatch",
            "--model.policy=Threshold",
            "--model.policy.threshold=1.5",
            "--data=SemiSupervisedData",
            "--data.unlabeled_ratio=2",
        ],
        ["threshold=1.5", "(0, 1]"],
    ),
    "texts for an image network": (["--data.source=Phrases"], ["Phrases has texts", "text_cnn"]),
    "missing table": (["--data.source=TextTable", "--data.source.train=none.csv"], ["there is no file 'none.csv'"]),
    "unknown backbone": (["--model.network.backbone=tiny_mpl"], ["'tiny_mpl'", "Did you mean 'tiny_mlp'?"]),
    "unwritable run folder": (
        ["--trainer.default_root_dir=tiny.yaml/run"],
        ["cannot write to the run folder tiny.yaml/run", "--trainer.default_root_dir"],
    ),
}


@pytest.mark.parametrize(("typed", "expected"), BEFORE.values(), ids=BEFORE)
def test_known_before_training(here, refused, typed, expected) -> None:
    message = refused(*fit(*typed))
    for part in expected:
        assert part in message
    assert not [*here.rglob("*.ckpt"), *here.rglob("metrics.*")], "training had begun"


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_checkpoint_of_another_number_of_classes(refused, command) -> None:
    assert main(fit("--trainer.max_epochs=1")) == 0
    before = LAST.read_bytes()
    message = refused(command, "--ckpt_path", str(LAST), "--data.source.num_classes=5")
    assert "the checkpoint was trained for 3 classes, but SupervisedData has 5" in message
    assert LAST.read_bytes() == before


# --- known in the middle ----------------------------------------------------------------------------------------------


def folder_of_images(here: Path) -> list[str]:
    for label in range(3):
        for number in range(8):
            for part in ("train", "test"):
                path = here / "images" / part / f"class {label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8 + number, 8), 40 * label + number).save(path)  # of mixed size
    source = ["--data.source=ImageFolder", "--data.source.root=images", "--data.source.channels=1"]
    return [*source, "--data.source.size=8", "--data.val_size=0", "--data.labels_per_class=null"]


@pytest.mark.parametrize("kind", ["half", "empty class", "empty unlabeled"])
def test_folders_that_cannot_be_used_are_refused_before_training(here, refused, kind) -> None:
    source = folder_of_images(here)
    broken = here / "images" / "train" / "class 1" / "3.png"
    if kind == "half":
        broken.write_bytes(broken.read_bytes()[:40])
        parts = ["cannot read the image", "class 1/3.png", "1 of 48", "skip_broken: true"]
    elif kind == "empty class":
        (here / "images" / "train" / "class 9").mkdir()
        parts = ["SupervisedData: 1 of 4 classes have no labelled sample: 3 (class 9)"]
    else:
        (here / "images" / "unlabeled").mkdir()
        parts = ["unlabeled holds no images"]
    message = refused(*fit(*source))
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1
    assert not [*here.rglob("*.ckpt"), *here.rglob("metrics.*")], "training had begun"


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image(here, refused, workers) -> None:
    """Damage in the middle of a file, which shows when it is read."""
    source = [*folder_of_images(here), f"--data.num_workers={workers}"]
    broken = here / "images" / "train" / "class 1" / "3.png"
    content = bytearray(broken.read_bytes())
    content[45:50] = b"12345"
    broken.write_bytes(bytes(content))
    message = refused(*fit(*source))
    assert "cannot read the image" in message
    assert "class 1/3.png" in message
    assert len(message.splitlines()) == 1
    assert main(fit(*source, "--data.source.skip_broken=true", "--trainer.max_epochs=1")) == 0


def test_loss_that_is_no_number(here, refused) -> None:
    (here / "own_poison.py").write_text(POISON)
    message = refused(*fit("--trainer.callbacks+=own_poison.Poison"))
    assert "the loss became NaN or infinite at step 4 (batch 1 of epoch 1)" in message
    assert "Samples of that batch: labeled: " in message
    split = json.loads(Path("runs/tiny/split.json").read_text())
    named = {int(number) for number in message.partition("labeled: ")[2].partition(".")[0].split(",")}
    assert len(named) == 8
    assert named <= set(split["parts"]["labeled"])
    assert f"The last good checkpoint is {LAST}" in message or str(LAST.resolve()) in message
    assert step_of(LAST) == 3
    weights = torch.load(LAST, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


class FullDisk(io.FileIO):
    """A file on a disk with room for a few bytes."""

    def write(self, data):
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_disk_that_fills_up_while_saving(here, refused, monkeypatch) -> None:
    opened = []

    def room_for_one_epoch(path, mode):
        opened.append(path)
        return open(path, mode) if len(opened) <= 2 else FullDisk(path, "w")

    monkeypatch.setattr(checkpoint_io, "open", room_for_one_epoch, raising=False)
    message = refused(*fit())
    assert "cannot write" in message
    assert "No space left on device; the previous checkpoint is kept" in message
    assert sorted(path.name for path in LAST.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert step_of(LAST) == 3
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main(["fit", "--ckpt_path", str(LAST)]) == 0
    assert step_of(LAST) == 6
