"""The blocks of every README run as they stand there, in the order in which they stand, made small by an overlay."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from zoo.__main__ import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SMALL = """
model: {class_path: FixMatch, init_args: {network: {class_path: Network, init_args: {weights: null}}}}
data:
  class_path: SemiSupervisedData
  init_args:
    source: {class_path: ImageFolder, init_args: {size: 32}}
    batch_size: 2
    unlabeled_ratio: 1
    num_workers: 0
    allow_repeats: true
"""


def blocks(text: str) -> list[tuple[str, str, str, str]]:
    """(section, language, what, text) of every fenced block that is marked with ``file=`` or ``run``."""
    found, section = [], ""
    for match in re.finditer(r"^#{2,3} ([^\n]+)$|^```(\w+) (\S+)\n(.*?)^```$", text, re.M | re.S):
        if match[1]:
            section = match[1]
        else:
            found.append((section, match[2], match[3], match[4]))
    return found


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the repository's configs and some photographs."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for part, count in (("train", 12), ("test", 3)):
        for number, name in enumerate(("cat", "dog")):
            (folder / "photos" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 36), (90 * number, 20 * i, 60)).save(folder / "photos" / part / name / f"{i}.jpg")
    return folder


def shrink(words: list[str]) -> list[str]:
    """The same command with a few steps on the processor."""
    if words[0] != "fit":
        return words + (["--trainer.accelerator=cpu"] if words[0] in ("test", "predict", "validate") else [])
    small = ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"]
    if not any("smoke.yaml" in word or "max_steps" in word for word in words):
        small += ["--trainer.max_steps=2"]
    if "photos.yaml" in words:
        Path("small.yaml").write_text(SMALL)
        small += ["-c", "small.yaml"]
    if any("quickstart" in word for word in words):  # the baseline and the test of the real run are not repeated here
        small += ["--trainer.callbacks=[{class_path: RunSummary, init_args: {picture: false}}]"]
    return [*words, *small]


@pytest.mark.parametrize("readme", ["README.md", "zoo/semi_supervised/README.md"])
def test_every_block_in_order(readme, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for section, language, what, text in blocks((ROOT / readme).read_text()):
        print(readme, section, what)  # noqa: T201 - names the block when a later line fails
        run_block(folder, section, language, what, text)


def run_block(folder: Path, section: str, language: str, what: str, text: str) -> None:
    """Write the block's file, or run its commands."""
    if what.startswith("file="):
        (folder / what[5:]).write_text(text)
    elif language == "python":
        exec(compile(text, section, "exec"), {})
    elif what == "run=two":
        (command,) = text.strip().splitlines()
        words = shrink(shlex.split(command)[1:])
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(
            [sys.executable, "-m", "zoo", *words], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        for command in text.strip().splitlines():
            words = shlex.split(command)
            assert words[0] == "zoo"
            assert main(shrink(words[1:])) in (0, None), command
    if language == "bash" and "predict" in text:
        rows = (folder / "runs" / "photos" / "predictions.csv").read_text().splitlines()
        assert len(rows) == 1 + 6
        assert "cat" in rows[1] or "dog" in rows[1]


def test_the_readme_names_every_family() -> None:
    from zoo.catalog import methods

    for family in {entry.family for entry in methods().values()}:
        assert f"zoo.{family}" in TEXT
