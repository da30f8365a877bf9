import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

import zoo
from zoo import hub
from zoo.core.weights import WeightsError


def network(classes):
    return zoo.Network(classes, backbone="lenet", in_channels=1, image_size=28)


def make(**kwargs):
    recipe = partial(zoo.Network, backbone="lenet", in_channels=1, image_size=28)
    method = zoo.FixMatch(**{"network": recipe, "num_classes": 4, "unlabeled_weight": 0.5, **kwargs})
    method.configure_model()
    with torch.no_grad():  # a teacher that differs from its student, as after training
        for parameter in method.teacher.parameters():
            parameter.add_(0.01)
    return method.eval()


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    method = make()
    hub.save_pretrained(method, tmp_path / "saved", {"test/accuracy": 0.9125})
    return method, tmp_path / "saved"


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def with_argument(folder, **arguments):
    config = json.loads((folder / "config.json").read_text())
    rewrite(folder, init_args={**config["init_args"], **arguments})


def test_save_pretrained_and_load_give_the_same_outputs(saved):
    method, folder = saved
    loaded = zoo.load(folder)
    x = torch.randn(3, 1, 28, 28)
    assert type(loaded) is zoo.FixMatch
    assert not loaded.training
    assert loaded.unlabeled_weight == 0.5
    assert torch.equal(loaded(x), method(x))
    assert torch.equal(loaded.network(x), method.network(x))
    assert not torch.equal(loaded(x), loaded.network(x))  # the teacher is not the student


def test_checkpoint_and_run_folder_load(tmp_path):
    method = make()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    trainer.strategy.connect(method)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
    x = torch.randn(3, 1, 28, 28)
    for name in (path, tmp_path / "run"):
        assert torch.equal(zoo.load(name)(x), method(x))


def test_overrides_replace_recorded_arguments(saved):
    _, folder = saved
    assert zoo.load(folder, unlabeled_weight=2.0).unlabeled_weight == 2.0


def test_what_was_loaded_can_be_saved_again(saved, tmp_path):
    method, folder = saved
    loaded = zoo.load(folder, momentum=0.5)
    hub.save_pretrained(loaded, tmp_path / "again")
    again = zoo.load(tmp_path / "again")
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(again(x), method(x))
    assert (again.momentum, again.unlabeled_weight) == (0.5, 0.5)
    assert "unrecorded" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_unrecorded_arguments_are_asked_for_and_taken(tmp_path):
    method = make(network=lambda classes: network(classes))
    hub.save_pretrained(method, tmp_path)
    with pytest.raises(WeightsError, match="could not be recorded: network"):
        zoo.load(tmp_path)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(zoo.load(tmp_path, network=network)(x), method(x))


def test_tied_tensors_survive(tmp_path):
    method = make()
    method.network.head.again = nn.Linear(84, 4)
    method.network.head.again.weight = method.network.head.weight
    tensors = hub._tensors(method)
    assert torch.equal(tensors["network.head.again.weight"], tensors["network.head.weight"])
    hub.save_pretrained(method, tmp_path)  # safetensors refuses shared storage; copies are written
    assert (tmp_path / "model.safetensors").is_file()


def test_model_card_says_what_it_is(saved):
    _, folder = saved
    text = (folder / "README.md").read_text()
    for expected in ("# FixMatch", "arxiv.org/abs/2001.07685", "| test/accuracy | 0.9125 |", "zoo.load", "lenet"):
        assert expected in text
    assert str(folder) not in text


def test_pretrained_weights_are_not_fetched_again(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["init_args"]["network"]["init_args"]["weights"] = "hf-hub:nobody/nothing"
    (folder / "config.json").write_text(json.dumps(config))
    zoo.load(folder)


def test_checksum_is_compared_before_reading(saved):
    _, folder = saved
    digest = hub._digest(folder / "model.safetensors")
    hub.verify(folder, digest)
    hub.verify(folder / "model.safetensors", "sha256:" + digest.upper().lower())
    zoo.load(folder, sha256=digest)
    with pytest.raises(WeightsError, match="not the file that was promised"):
        zoo.load(folder, sha256="0" * 64)
    with pytest.raises(ValueError, match="64 hexadecimal"):
        zoo.load(folder, sha256="abc")


def test_changed_weights_are_noticed(saved):
    _, folder = saved
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="not the file that was promised"):
        zoo.load(folder)


@pytest.mark.parametrize("length", [0, 5, 100, 5000])
def test_truncated_weights(saved, length):
    _, folder = saved
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    rewrite(folder, sha256=None)
    with pytest.raises(WeightsError, match="damaged"):
        zoo.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}', "\x00", "[" * 100_000])
def test_damaged_config(saved, text):
    _, folder = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError):
        zoo.load(folder)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("true",)


@pytest.mark.parametrize("content", [Evil(), {"state_dict": Evil()}, {"state_dict": {}}, [1], {"a": torch.zeros(2)}])
def test_hostile_or_foreign_checkpoints(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError):
        zoo.load(tmp_path / "x.ckpt")


def test_truncated_checkpoint(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, tmp_path / "x.ckpt")
    content = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        zoo.load(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "value",
    [
        "os.system",
        {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}},
        '{"class_path": "subprocess.Popen"}',  # a parser would read YAML in a string
        '{class_path: "subprocess\\x2ePopen"}',
        "zoo.hub.os.system",
        "zoo.core.weights.os.system",
        "zoo.hub.push",
        "torch.hub.load",
        "torch.load",
        "this.s",  # prints a poem when imported
        {"deep": [[{"x": "builtins.eval"}]]},
        {"builtins.eval": 1},
    ],
)
@pytest.mark.parametrize("argument", ["network", "optimizer", "scheduler", "lr_multipliers"])
def test_foreign_class_paths_are_refused_by_name(saved, argument, value):
    _, folder = saved
    with_argument(folder, **{argument: value})
    with pytest.raises(WeightsError, match="refused"):
        zoo.load(folder)


@pytest.mark.parametrize(
    "value", ["os.system", "torch.nn.Linear", "zoo.hub.push", "zoo.Card", "zoo.Nothing", "FixMatch", 3, None]
)
def test_only_methods_are_rebuilt(saved, value):
    _, folder = saved
    rewrite(folder, class_path=value)
    with pytest.raises(WeightsError):
        zoo.load(folder)


def test_looking_imports_nothing(saved):
    import sys

    _, folder = saved
    with_argument(folder, network="antigravity.fly")
    with pytest.raises(WeightsError, match=r"antigravity\.fly"):
        zoo.load(folder)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("path", ["torch.optim.Adam", "timm.optim.Lamb"])
def test_optimizers_of_the_libraries_are_allowed(saved, path):
    _, folder = saved
    with_argument(folder, optimizer={"class_path": path, "init_args": {"lr": 0.1}})
    assert zoo.load(folder).configure_optimizers().__class__.__name__ == path.rpartition(".")[2]


def test_files_and_yaml_bombs_are_refused(saved, tmp_path):
    _, folder = saved
    (tmp_path / "evil.yaml").write_text("class_path: subprocess.Popen\n")
    bomb = (
        "[&a [x,x,x,x,x,x,x,x,x]"
        + "".join(f",&{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True))
        + "]"
    )
    for value in (str(tmp_path / "evil.yaml"), bomb, "x" * 20_000):
        with_argument(folder, optimizer=value)
        with pytest.raises(WeightsError):
            zoo.load(folder)


@pytest.mark.parametrize("key", ["trust_remote_code", "checkpoint_path"])
def test_remote_code_is_refused(saved, key):
    _, folder = saved
    with_argument(folder, network={"class_path": "zoo.Network", "init_args": {"arguments": {key: True}}})
    with pytest.raises(WeightsError, match=key):
        zoo.load(folder)


def test_names_with_dots_are_no_class_paths():
    hub._check({"backbone": "resnet50.a1_in1k", "x": "vit_base_patch16_224.augreg", "prompt": "a photo of a {}."}, "x")


def test_newer_format_says_update(saved):
    _, folder = saved
    rewrite(folder, format_version=99)
    with pytest.raises(WeightsError, match="format_version=99"):
        zoo.load(folder)


def test_weights_of_another_shape_are_named(saved):
    _, folder = saved
    with_argument(folder, num_classes=7)
    with pytest.raises(WeightsError, match="another shape"):
        zoo.load(folder)


def test_missing_path_suggests_the_nearest(saved, tmp_path):
    with pytest.raises(WeightsError, match="Did you mean 'saved'"):
        zoo.load(tmp_path / "savde")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="neither config"):
        zoo.load(tmp_path / "empty")


def test_hub_without_a_connection(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(WeightsError, match=r"owner/name could not be fetched .*give its path"):
        zoo.load("hf-hub:owner/name")


def test_hub_takes_the_revision(monkeypatch, saved):
    import huggingface_hub

    _, folder = saved
    asked = {}

    def fake(repository, revision, allow_patterns):
        asked.update(repository=repository, revision=revision)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    zoo.load("hf-hub:owner/name@v1")
    assert asked == {"repository": "owner/name", "revision": "v1"}
    zoo.load("hf-hub:owner/name", revision="v2")
    assert asked["revision"] == "v2"
    with pytest.raises(ValueError, match="two revisions"):
        zoo.load("hf-hub:owner/name@v1", revision="v2")
    with pytest.raises(ValueError, match="not on the hub"):
        zoo.load(folder, revision="v2")


def test_push_uploads_what_load_reads(monkeypatch, saved):
    import huggingface_hub

    method, folder = saved
    seen = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            seen["repo"] = repo_id, private

        def upload_folder(self, repo_id, folder_path, **_):
            from pathlib import Path

            seen["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.push(method, "owner/name", private=True) == "https://hub/commit"
    assert seen == {"repo": ("owner/name", True), "files": ["README.md", "config.json", "model.safetensors"]}
    assert hub.push(folder, "owner/name") == "https://hub/commit"
    with pytest.raises(WeightsError, match="save_pretrained first"):
        hub.push(folder.parent, "owner/name")
