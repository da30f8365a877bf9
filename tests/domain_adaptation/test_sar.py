import math
from functools import partial

import pytest
import torch
from torch import nn

from zoo import SAR, Tent
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.losses import entropy

NETWORK = partial(Network, backbone="tiny_cnn", in_channels=1, arguments={"width": 4})
VIT = partial(
    Network, backbone="vit_tiny_cifar", in_channels=1, arguments={"depth": 2, "embed_dim": 48, "img_size": 12}
)


def method(make=SAR, network=NETWORK, **arguments):
    torch.manual_seed(1)
    arguments = {"adaptation_optimizer": partial(torch.optim.SGD, lr=0.2), **arguments}
    made = make(network=network, num_classes=3, **arguments)
    made.configure_model()
    made.eval()._adapts = True
    return made


def batches(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 8, 1, 12, 12, generator=torch.Generator().manual_seed(5)) * 2


def test_without_sharpness_and_margins_it_is_tent() -> None:
    ours, tent = method(rho=0.0, entropy_margin=math.inf, collapse=0.0), method(Tent)
    for x in batches():
        assert torch.allclose(ours(x), tent(x), atol=1e-6)


def test_step_is_the_gradient_above_of_what_is_reliable_here_and_there() -> None:
    made, x = method(rho=0.5, entropy_margin=0.98, collapse=0.0), batches(1)[0]
    made.reset()
    named, limit = made.now.named, 0.98 * math.log(3)
    start = {name: p.detach().clone() for name, p in named.items()}
    h = entropy(made.adapted(x))
    here = h < limit
    assert 0 < here.sum() < len(x)
    g = torch.autograd.grad(h[here].mean(), list(named.values()))
    size = torch.stack([part.norm() for part in g]).norm()
    with torch.no_grad():
        for p, part in zip(named.values(), g, strict=True):
            p += 0.5 * part / size
    h = entropy(made.adapted(x))
    both = here & (h < limit)
    wanted = torch.autograd.grad(h[both].mean(), list(named.values()))
    value = float(h[both].detach().mean())
    made.reset()
    made(x)
    for (name, p), part in zip(made.now.named.items(), wanted, strict=True):
        assert torch.allclose(p, start[name] - 0.2 * part, atol=1e-6)
    assert float(made.average) == pytest.approx(value, abs=1e-6)


def test_recovers_before_it_collapses() -> None:
    made = method(entropy_margin=2.0, collapse=100.0)
    first = [made(x) for x in batches(1) for _ in range(3)]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])
    assert made.average is None
    made = method(entropy_margin=2.0, collapse=0.0)
    assert not torch.equal(made(batches(1)[0]), made(batches(1)[0]))


def test_nothing_reliable_changes_nothing() -> None:
    made = method(entropy_margin=1e-6)
    made.reset()
    before = [p.detach().clone() for p in made.adapted.parameters()]
    for x in batches():
        made(x)
    assert all(torch.equal(a, b) for a, b in zip(made.adapted.parameters(), before, strict=True))
    assert made.average is None


def test_layer_norms_adapt_but_for_the_top_ones() -> None:
    made = method(network=VIT, entropy_margin=2.0, skip=("blocks.1", "norm"))
    made(batches(1)[0])
    layers = {name for name, part in made.adapted.named_modules() if isinstance(part, nn.LayerNorm)}
    adapting = {name.rpartition(".")[0] for name in made.now.named}
    assert adapting == {name for name in layers if ".blocks.0." in name}
    assert adapting < layers
    moved = {n for n, p in made.adapted.named_parameters() if not torch.equal(p, made.network.get_parameter(n))}
    assert moved == set(made.now.named)


def test_refusals() -> None:
    with pytest.raises(UserError, match="rho=-1"):
        method(rho=-1)
    with pytest.raises(UserError, match="collapse=-1"):
        method(collapse=-1)
    with pytest.raises(UserError, match="is left to adapt"):
        method(skip=("stages",)).reset()
