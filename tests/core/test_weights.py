import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zoo.core.weights import (
    WeightsError,
    choose_part,
    efficientnet_lite_weights,
    find_weights,
    load_into,
    read_state_dict,
    write_atomically,
)


class Hostile:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def layer():
    return {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt", ".bin"])
def test_reads_what_was_written(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(layer(), path)
    else:
        torch.save({"state_dict": layer(), "epoch": 3} if suffix == ".ckpt" else layer(), path)
    read = read_state_dict(path)
    assert read.keys() == layer().keys()
    assert all(torch.equal(read[name], value) for name, value in layer().items())


def test_folder_prefers_safetensors(tmp_path):
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file(layer(), tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path).keys() == layer().keys()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth"])
def test_hostile_pickle_is_refused_and_does_not_run(tmp_path, suffix):
    witness, path = tmp_path / "witness", tmp_path / f"hostile{suffix}"
    torch.save({"state_dict": {"weight": Hostile(witness)}}, path)
    with pytest.raises(WeightsError, match="could run code"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(Hostile(witness)))
    with pytest.raises(WeightsError, match="could run code"):
        read_state_dict(path)
    path.rename(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="damaged"):
        read_state_dict(tmp_path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Hostile(witness)))  # the trap works
    assert witness.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 10, 60, -20])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    path = tmp_path / f"w{suffix}"
    save_file(layer(), path) if suffix == ".safetensors" else torch.save(layer(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="damaged"):
        read_state_dict(path)


@pytest.mark.parametrize(("content", "message"), [([1, 2], "holds list"), ({"epoch": 1}, "holds no tensors")])
def test_files_without_names_and_tensors(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        read_state_dict(tmp_path / "w.pt")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no file or folder"):
        read_state_dict(tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="holds none of"):
        read_state_dict(tmp_path)
    with pytest.raises(WeightsError, match="Did you mean 'pretrained'"):
        find_weights("pretraind")


def test_unreachable_hub_says_what_to_do(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"hf-hub:owner/name@v1 could not be fetched.*weights: PATH.safetensors"):
        find_weights("hf-hub:owner/name@v1")


def test_hub_is_asked_for_safetensors_at_the_revision_first(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repository, name, revision):
        asked.append((repository, name, revision))
        if name.endswith(".safetensors"):
            raise LocalEntryNotFoundError("nothing")
        torch.save(layer(), tmp_path / name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_weights("hf-hub:owner/name@v1").keys() == layer().keys()
    assert asked == [("owner/name", "model.safetensors", "v1"), ("owner/name", "pytorch_model.bin", "v1")]
    find_weights("hf-hub:owner/name")
    assert asked[-1][-1] is None


def test_offline_mode_is_left_as_it_was(monkeypatch):
    import socket

    from huggingface_hub import constants

    from zoo.core import weights

    def no_name(*_):
        raise socket.gaierror("no name")

    monkeypatch.setattr(weights, "getproxies", dict)
    monkeypatch.setattr(weights.socket, "getaddrinfo", no_name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with weights.offline_if_unreachable():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), weights.offline_if_unreachable():
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(weights, "getproxies", lambda: {"https": "http://proxy"})
    with weights.offline_if_unreachable():
        assert not constants.HF_HUB_OFFLINE


def checkpoint(teacher=True):
    state = {"network.head.weight": torch.zeros(1), "network.backbone.w": torch.zeros(1), "policy.x": torch.ones(1)}
    if teacher:
        state |= {"teacher.module.head.weight": torch.ones(1), "teacher.module.backbone.w": torch.ones(1)}
        state |= {"teacher.updates": torch.tensor(3)}
    return state


@pytest.mark.parametrize(
    ("part", "teacher", "value"),
    [("predictor", True, 1), ("predictor", False, 0), ("network", True, 0), ("teacher", True, 1)],
)
def test_part_of_a_checkpoint(part, teacher, value):
    chosen = choose_part(checkpoint(teacher), part)
    assert chosen.keys() == {"head.weight", "backbone.w"}
    assert all(tensor.item() == value for tensor in chosen.values())


def test_backbone_part_and_missing_teacher():
    assert choose_part(checkpoint(), "backbone") == {"backbone.w": torch.ones(1)}
    with pytest.raises(WeightsError, match="part='teacher'"):
        choose_part(checkpoint(teacher=False), "teacher")
    with pytest.raises(WeightsError, match="part='teacher'"):
        choose_part(layer(), "teacher")


def test_wrappers_prefixes_are_taken_off():
    assert choose_part({"module.a": torch.ones(1), "module.b": torch.ones(1)}).keys() == {"a", "b"}
    assert choose_part({"module.a": torch.ones(1), "b": torch.ones(1)}).keys() == {"module.a", "b"}
    assert choose_part({"network._orig_mod.head.weight": torch.ones(1)}).keys() == {"head.weight"}


def test_load_reports_everything_and_changes_nothing():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {
        "0.weight": torch.zeros(4, 3),
        "0.bias": torch.zeros(2),
        "1.weight": torch.zeros(2, 2),
        "x": torch.zeros(1),
    }
    with pytest.raises(WeightsError) as error:
        load_into(module, state, "w.pt")
    for words in (
        "w.pt does not fit Sequential",
        "1 missing: 1.bias",
        "1 unexpected: x",
        "0.weight (4, 3) instead of (2, 3)",
    ):
        assert words in str(error.value)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1)}, "1 unexpected: x"),
        ({"bias": torch.zeros(3)}, r"1 of another shape: bias \(3,\) instead of \(2,\)"),
    ],
)
def test_each_misfit_alone_is_an_error(change, message):
    with pytest.raises(WeightsError, match=message):
        load_into(nn.Linear(3, 2), {**layer(), **change})


def test_load_into_the_meta_device():
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    load_into(module, layer())
    assert torch.equal(module.weight, layer()["weight"])
    assert isinstance(module.weight, nn.Parameter)


def test_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))
    assert path.read_text() == "old"

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]
    with path.open() as reader:  # who has the old file open keeps reading it
        write_atomically(path, lambda temporary: temporary.write_text("new"))
        assert (reader.read(), path.read_text()) == ("old", "new")
    write_atomically(path, lambda temporary: save_file(layer(), temporary))
    assert os.listdir(path.parent) == ["file.txt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("number", [0, 1, 2])
def test_efficientnet_lite_blocks_are_timms(number):
    import timm

    from zoo.core.weights import LITE_STAGES, lite_name

    with torch.device("meta"):
        model = timm.create_model(f"tf_efficientnet_lite{number}")
    stages = LITE_STAGES[f"efficientnet-lite{number}"]
    assert tuple(len(stage) for stage in model.blocks) == stages
    assert lite_name("_blocks.0._bn2.weight", stages) == "blocks.0.0.bn2.weight"
    assert lite_name("_blocks.1._bn2.weight", stages) == "blocks.1.0.bn3.weight"
    last = sum(stages) - 1
    assert lite_name(f"_blocks.{last}._bn0.running_mean", stages) == "blocks.6.0.bn1.running_mean"
    assert lite_name("_fc.bias", stages) == "classifier.bias"


def test_efficientnet_lite_names():
    with pytest.raises(WeightsError, match="must be one of efficientnet-lite0, "):
        efficientnet_lite_weights("efficientnet-lite")
