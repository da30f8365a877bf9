import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.core.errors import UserError
from zoo.core.necks import Bottleneck, UnitLength
from zoo.core.network import Network
from zoo.core.weights import WeightsError

small = partial(Network, backbone="tiny_cnn", in_channels=1)
necked = partial(small, neck=partial(Bottleneck, width=7))


def test_features_are_those_behind_the_neck() -> None:
    network = necked(3).eval()
    x = torch.randn(4, 1, 28, 28)
    assert network.num_features == network.head.in_features == 7
    torch.testing.assert_close(network.features(x), network.neck(network.backbone.features(x)))
    assert network(x).shape == (4, 3)
    assert (network.features(x) >= 0).all()


def test_without_a_neck_nothing_stands_between() -> None:
    assert not [name for name in small(3).state_dict() if name.startswith("neck.")]


def test_parts_can_be_left_out() -> None:
    plain = Bottleneck(5, 4, norm=False, relu=False)
    x = torch.randn(2, 5)
    torch.testing.assert_close(plain(x), x @ plain.linear.weight.T + plain.linear.bias)
    assert Bottleneck(5).linear.bias is None  # BatchNorm has one


def test_dropout_keeps_values_or_lengths() -> None:
    x = torch.randn(256, 5)
    for keeps in ("values", "length"):
        neck = Bottleneck(5, 400, norm=False, dropout=0.75, dropout_keeps=keeps)
        plain, dropped = neck.eval()(x), neck.train()(x)
        squares = (dropped.square().sum() / plain.square().sum()).item()
        values = (dropped.sum() / plain.sum()).item()
        assert values == pytest.approx(1.0 if keeps == "values" else 0.5, rel=0.05)
        assert squares == pytest.approx(4.0 if keeps == "values" else 1.0, rel=0.05)
        kept = dropped != 0
        assert torch.allclose(dropped[kept], plain[kept] * (4.0 if keeps == "values" else 2.0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"width": 0}, "width=0"), ({"dropout": 1.0}, "dropout=1.0"), ({"dropout_keeps": "norm"}, "dropout_keeps='norm'")],
)
def test_refuses(arguments, named) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        Bottleneck(5, **arguments)


def test_weights_with_and_without_a_neck(tmp_path) -> None:
    with_neck, without = tmp_path / "with.safetensors", tmp_path / "without.safetensors"
    save_file(dict(necked(3).state_dict()), with_neck)
    save_file(dict(small(3).state_dict()), without)
    again = necked(3, weights=str(with_neck))
    for name, value in load_file(with_neck).items():
        torch.testing.assert_close(again.state_dict()[name], value)
    with pytest.raises(WeightsError, match="another backbone or neck"):
        small(3, weights=str(with_neck))
    only_backbone = necked(3, weights=str(without), weights_part="backbone")
    theirs = small(3, weights=str(without))
    for name, value in theirs.backbone.state_dict().items():
        torch.testing.assert_close(only_backbone.backbone.state_dict()[name], value)


def test_unit_length_keeps_directions_only() -> None:
    network = small(3, neck=UnitLength).eval()
    x = torch.randn(4, 1, 28, 28)
    features = network.features(x)
    assert network.num_features == network.backbone.num_features
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(features * network.backbone.features(x).norm(dim=1, keepdim=True), network.backbone(x))
    assert not [name for name in network.state_dict() if name.startswith("neck.")]
    neck = UnitLength(5)
    assert torch.equal(neck(torch.zeros(2, 5)), torch.zeros(2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert neck(torch.full((1, 5), 1e4)).isfinite().all()
