import math
from functools import partial

import pytest
import torch
from torch import nn

from zoo import AdaptiveBatchNorm
from zoo.core.errors import UserError
from zoo.core.network import Network

NETWORK = partial(Network, backbone="tiny_cnn", in_channels=1, arguments={"width": 4})


def method(**arguments):
    torch.manual_seed(1)
    made = AdaptiveBatchNorm(network=NETWORK, num_classes=3, **arguments)
    made.configure_model()
    for layer in norms(made):
        layer.running_mean, layer.running_var = torch.randn(layer.num_features), torch.rand(layer.num_features) + 0.5
    made.eval()._adapts = True
    return made


def norms(made) -> list[nn.BatchNorm2d]:
    return [layer for layer in made.modules() if isinstance(layer, nn.BatchNorm2d)]


def test_without_a_prior_it_is_batch_norm_in_training() -> None:
    made, x = method(), torch.randn(6, 1, 12, 12) + 2
    ours = made(x)
    trained = method()
    trained.network.train()
    assert torch.allclose(ours, trained.network(x), atol=1e-5)


def test_an_infinite_prior_is_the_network_as_it_was() -> None:
    made, x = method(prior=math.inf), torch.randn(6, 1, 12, 12) + 2
    assert torch.allclose(made(x), made.predictor(x), atol=1e-6)


def test_first_layer_mixes_by_the_number_of_samples() -> None:
    """Schneider et al., equation 1."""
    made, x = method(prior=3.0), torch.randn(6, 1, 12, 12).double() + 2
    made.double()
    made(x)
    first, source = norms(made.adapted)[0], norms(made.network)[0]
    maps = made.network.backbone.model.stages[0][0](x)
    mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)
    assert torch.allclose(first.running_mean, (3 * source.running_mean + 6 * mean) / 9)
    assert torch.allclose(first.running_var, (3 * source.running_var + 6 * variance) / 9)


@pytest.mark.parametrize("prior", [0.0, 5.0])
def test_online_knows_all_batches_so_far(prior) -> None:
    x = (torch.randn(11, 1, 12, 12) * torch.linspace(0.5, 2, 11).view(-1, 1, 1, 1) + 2).double()
    made = method(mode="online", prior=prior).double()
    for part in x.split([4, 6, 1]):
        made(part)
    first, source = norms(made.adapted)[0], norms(made.network)[0]
    maps = made.network.backbone.model.stages[0][0](x)
    share = 11 / (11 + prior)
    mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)
    assert torch.allclose(first.running_mean, share * mean + (1 - share) * source.running_mean)
    assert torch.allclose(first.running_var, share * variance + (1 - share) * source.running_var)


def test_whole_set_is_known_before_the_first_prediction_and_then_stays() -> None:
    x = torch.randn(12, 1, 12, 12).double() + 2
    made = method(whole_set=True).double()
    made.reset()
    made.begin(iter(x.split(12)))
    together = made(x)
    online = method(mode="episodic").double()
    assert torch.allclose(together, online(x)), "one batch is the whole set"
    assert torch.allclose(torch.cat([made(part) for part in x.split(5)]), together), "a prediction is the sample's own"


def test_episodic_batches_do_not_know_each_other() -> None:
    x = torch.randn(2, 5, 1, 12, 12)
    made = method()
    first = made(x[0])
    made(x[1])
    assert torch.equal(made(x[0]), first)


def test_ranks_take_their_statistics_together(on_ranks) -> None:
    x = torch.randn(7, 1, 12, 12) + 2
    ours, theirs = on_ranks(lambda rank: method(mode="online", prior=2.0)(x[:4] if rank == 0 else x[4:]).detach())
    assert torch.allclose(torch.cat([ours, theirs]), method(mode="online", prior=2.0)(x), atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(UserError, match="prior=-1"):
        method(prior=-1)
    with pytest.raises(UserError, match="whole_set"):
        method(whole_set=True, mode="episodic")
    made = AdaptiveBatchNorm(network=partial(Network, backbone="lenet", in_channels=1), num_classes=3)
    made.configure_model()
    with pytest.raises(UserError, match="no BatchNorm"):
        made.reset()
