"""The blocks of every README run as they stand there, in the order in which they stand, made small by an overlay."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules import PACS, Data, Office31
from zoo.__main__ import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
READMES = [
    "README.md",
    *(f"zoo/{family}/README.md" for family in ("semi_supervised", "domain_adaptation", "weak_to_strong")),
]
SMALL = {
    "photos.yaml": """
model: {class_path: FixMatch, init_args: {network: {class_path: Network, init_args: {weights: null}}}}
data:
  class_path: SemiSupervisedData
  init_args:
    source: {class_path: ImageFolder, init_args: {size: 32}}
    batch_size: 2
    unlabeled_ratio: 1
    num_workers: 0
    allow_repeats: true
""",
    "mine.yaml": """
model: {class_path: CDAN, init_args: {network: {class_path: Network, init_args: {backbone: resnet18, weights: null}}}}
data:
  class_path: DomainData
  init_args:
    source: {class_path: DomainFolders, init_args: {size: 32}}
    target: {class_path: DomainFolders, init_args: {size: 32}}
    batch_size: 2
    num_workers: 0
""",
}
QUIET = "--trainer.callbacks=[{class_path: RunSummary, init_args: {picture: false}}]"


def blocks(text: str) -> list[tuple[str, str, str, str]]:
    """(section, language, what, text) of every fenced block that is marked with ``file=`` or ``run``."""
    found, section = [], ""
    for match in re.finditer(r"^#{2,3} ([^\n]+)$|^```(\w+) (\S+)\n(.*?)^```$", text, re.M | re.S):
        if match[1]:
            section = match[1]
        else:
            found.append((section, match[2], match[3], match[4]))
    return found


def photographs(folder: Path, names: Iterable[str], count: int = 2) -> None:
    """A folder for each class, of pictures in its own colour."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 36), (8 * number, 20 * i, 60)).save(folder / name / f"{i}.jpg")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the repository's configs, some photographs, and some of two domains."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for part, count in (("train", 12), ("test", 3)):
        photographs(folder / "photos" / part, ("cat", "dog"), count)
    for domain in ("studio", "street"):
        photographs(folder / "data" / "mine" / domain, ("cat", "dog"), 6)
    return folder


def shrink(words: list[str]) -> list[str]:
    """The same command with a few steps on the processor; of a pipeline the command lines alone."""
    if words[0] == "pipeline":
        return [*words, "--dry_run"]
    if words[0] != "fit":
        return words + (["--trainer.accelerator=cpu"] if words[0] in ("test", "predict", "validate") else [])
    small = ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"]
    if not any("smoke.yaml" in word or "max_steps" in word for word in words):
        small += ["--trainer.max_steps=2"]
    for name in SMALL.keys() & set(words):
        Path("small.yaml").write_text(SMALL[name])
        small += ["-c", "small.yaml"]
    if any("quickstart" in word or "source_only" in word for word in words):
        small += [QUIET]  # the baseline and the test of the real run are not repeated here
    return [*words, *small]


@pytest.mark.parametrize("readme", READMES)
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
    elif what == "data":
        check_data(text)
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
    if language == "bash" and "predict_folder" in text:
        rows = (folder / "runs" / "photos" / "predictions.csv").read_text().splitlines()
        assert len(rows) == 1 + 6
        assert "cat" in rows[1] or "dog" in rows[1]


def check_data(text: str) -> None:
    """A block that is a data module alone: the command line takes it, and it gives batches of samples as it says."""
    for domain in ("amazon", "webcam"):
        if not Path("data", domain).exists():
            photographs(Path("data", domain), Office31.names)
    for domain in PACS.domains:
        if not Path("data", domain).exists():
            photographs(Path("data", domain), PACS.names)
    rows = [
        {"text": f"this {product} is {word} {i}", "label": word, "product": product}
        for product in ("books", "kitchen")
        for word in ("good", "bad")
        for i in range(8)
    ]
    Path("reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parser = ArgumentParser()
    parser.add_subclass_arguments(Data, "data")
    given = yaml.safe_load(text)
    given["data"]["init_args"] |= {"allow_repeats": True, "batch_size": 6}  # there are few samples
    data = parser.instantiate(parser.parse_object(given)).data
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))[0]
    batch = data.on_after_batch_transfer(batch, 0)
    assert set(batch) == set(data.roles)
    assert all(len(role["index"]) for role in batch.values())
    assert "label" in batch["source"]
    assert data.test_dataloader()


@pytest.mark.parametrize("readme", READMES)
def test_every_block_is_executed(readme) -> None:
    """Or begins with what a test cannot do, the setting up."""
    text = (ROOT / readme).read_text()
    unmarked = re.findall(r"^```(?:bash|yaml|python)\n(.*?)^```$", text, re.M | re.S)
    assert all(block.startswith(("pip install", "uv run")) for block in unmarked)


def test_the_readme_names_every_family() -> None:
    from zoo.catalog import methods

    for family in {entry.family for entry in methods().values()}:
        assert f"zoo.{family}" in TEXT
