"""How a config is made small enough for two steps in a second, without changing what is tested."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

# Sources that need a download, or seconds to read, are replaced by seeded blobs of the same shape.
SHAPES = {
    "MNIST5k": (10, 28, 1),
    "Optdigits": (10, 28, 1),
    "FashionMNIST": (10, 28, 1),
    "CIFAR10": (10, 32, 3),
    "CIFAR100": (100, 32, 3),
    "SVHN": (10, 32, 3),
    "STL10": (10, 96, 3),
}


def blobs(source: dict[str, Any]) -> dict[str, Any]:
    """A stand-in for ``source``, or itself."""
    name = source["class_path"].rpartition(".")[2]
    if name not in SHAPES:
        return source
    classes, size, channels = SHAPES[name]
    return {"class_path": "Blobs", "init_args": {"num_classes": classes, "size": size, "channels": channels}}


@pytest.fixture
def tiny_overrides(tmp_path: Path) -> Callable[[Path], list[str]]:
    """An overlay for a config: synthetic data, small batches, no downloaded weights."""

    def overlay(path: Path) -> list[str]:
        given = yaml.safe_load(path.read_text())
        data = given["data"]["init_args"]
        changed: dict[str, Any] = {"steps": 4, "batch_size": 8}
        for key in ("source", "target"):
            if isinstance(data.get(key), dict):
                changed[key] = blobs(data[key])
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump({"data": {"class_path": given["data"]["class_path"], "init_args": changed}}))
        return ["-c", str(file)]

    return overlay


@pytest.fixture
def without_batch_norm() -> Callable[[str], list[str]]:
    """Replace every backbone by one with LayerNorm."""
    return lambda path: ["--model.network.backbone=tiny_mlp"]
