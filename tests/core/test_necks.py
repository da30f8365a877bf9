import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.core.errors import UserError
from zoo.core.necks import Bottleneck
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


@pytest.mark.parametrize(("arguments", "named"), [({"width": 0}, "width=0"), ({"dropout": 1.0}, "dropout=1.0")])
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
