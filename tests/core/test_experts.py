from functools import partial

import pytest
import torch
from torch.nn.functional import gelu

from zoo.core.errors import UserError
from zoo.core.experts import Aggregator, Experts
from zoo.core.network import Network

CNN = partial(Network, backbone="tiny_cnn", in_channels=1)


def experts() -> Experts:
    torch.manual_seed(0)
    networks = [CNN(3) for _ in range(3)]
    return Experts(networks, [0, 0, 1, 2], networks[0].num_features)


def test_features_are_those_of_the_frozen_networks() -> None:
    made, x = experts().train(), torch.randn(2, 1, 8, 8)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    tokens = made(x)
    assert not tokens.requires_grad
    for number in range(3):
        assert torch.equal(tokens[:, number], made[number].module.features(x))
    assert set(before) == {f"{n}.module.{name}" for n in range(3) for name in CNN(3).state_dict()}
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


def test_masks_differ_and_masking_is_by_hand() -> None:
    made, tokens = experts(), torch.randn(4, 2, 3, 16)
    drop, zero = made.masked(tokens, "drop"), made.masked(tokens, "zero")
    assert torch.equal(drop[0], tokens[0][:, [1, 2]])
    assert torch.equal(drop[2], tokens[2][:, [0, 2]])
    assert torch.equal(zero[3, :, :2], tokens[3, :, :2])
    assert zero[3, :, 2].abs().sum() == 0


def test_other_numbers_of_features_are_named() -> None:
    with pytest.raises(UserError, match="expert 0 has"):
        Experts([CNN(3)], [0], CNN(3).num_features + 1)


def test_order_of_the_experts_does_not_matter() -> None:
    aggregator, tokens = Aggregator(16, heads=4).eval(), torch.randn(5, 3, 16)
    assert torch.allclose(aggregator(tokens), aggregator(tokens[:, [2, 0, 1]]), atol=1e-6)
    assert aggregator(tokens).shape == (5, 16)


def test_aggregator_is_that_of_the_authors() -> None:
    """Normalised before, added after; a hidden layer of twice the width; the mean over the experts."""
    aggregator, x = Aggregator(16, depth=2, heads=4).double().eval(), torch.randn(5, 3, 16).double()
    y = x
    for layer in aggregator.layers:
        z = layer.norm1(y)
        y = y + layer.self_attn(z, z, z)[0]
        y = y + layer.linear2(gelu(layer.linear1(layer.norm2(y))))
        assert (layer.linear1.out_features, layer.self_attn.num_heads) == (32, 4)
    assert torch.allclose(aggregator(x), y.mean(dim=1), atol=1e-10)
