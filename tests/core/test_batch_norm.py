import torch
from torch import nn

from zoo import Network
from zoo.core.batch_norm import frozen_batch_norm


def statistics(module: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


def test_running_averages_stay_and_the_batch_normalises() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(8, 3) * 5 + 2
    before, expected = statistics(network), network(x)
    assert not all(map(torch.equal, before, statistics(network)))  # outside they move
    before = statistics(network)
    with frozen_batch_norm(network):
        assert torch.equal(network(x), expected)
    assert all(map(torch.equal, before, statistics(network)))
    network(x)
    assert not all(map(torch.equal, before, statistics(network)))  # and again afterwards


def test_evaluation_still_uses_the_running_averages() -> None:
    layer = nn.BatchNorm1d(2).eval()
    x = torch.randn(4, 2) + 10
    expected = layer(x)
    with frozen_batch_norm(layer):
        assert torch.equal(layer(x), expected)


def test_layers_without_averages_stay_without_and_errors_put_back() -> None:
    layers = nn.ModuleList([nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2)])
    try:
        with frozen_batch_norm(layers):
            raise RuntimeError
    except RuntimeError:
        pass
    assert [layer.track_running_stats for layer in layers] == [False, True]


def test_networks_of_the_zoo() -> None:
    for backbone in ("wrn_10_1", "resnet8_cifar"):
        network = Network(3, backbone=backbone, in_channels=1)
        before = statistics(network)
        with frozen_batch_norm(network):
            network(torch.randn(4, 1, 16, 16))
        assert all(map(torch.equal, before, statistics(network)))
