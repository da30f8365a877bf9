import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

from zoo.core import convolution
from zoo.core.convolution import SmallMapConv2d, spare_padding
from zoo.core.network import Network

# kernel, stride, padding, height, width
SMALL = [
    (3, 1, 1, 2, 2),
    (3, 1, 1, 1, 1),
    (3, 1, 1, 1, 2),
    (3, 2, 1, 2, 2),
    (3, 2, 1, 4, 4),
    (3, 1, 1, 3, 4),
    (5, 1, 2, 3, 2),
    (7, 2, 3, 4, 3),
    (2, 1, 1, 2, 1),  # an even kernel has a corner of padding alone
    (3, 3, 2, 4, 4),
    ((3, 5), (1, 2), (1, 2), 2, 3),
]
ORDINARY = {
    "groups": {"groups": 4},
    "dilation": {"dilation": 2, "padding": 2},
    "padding mode": {"padding_mode": "circular"},
    "padding by name": {"padding": "same"},
    "no padding": {"padding": 0, "kernel_size": 2},
    "one place": {"padding": 0, "kernel_size": 1},
}


@pytest.fixture
def narrow(monkeypatch) -> None:
    """Narrow layers are multiplied too."""
    monkeypatch.setattr(convolution, "_WEIGHTS", 1)


def pair(*args, **kwargs) -> tuple[SmallMapConv2d, nn.Conv2d]:
    torch.manual_seed(0)
    ours, plain = SmallMapConv2d(*args, **kwargs).double(), nn.Conv2d(*args, **kwargs).double()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize(("last", "bias"), [(False, True), (True, False)])
@pytest.mark.parametrize("case", SMALL)
def test_products_are_the_convolution_with_its_gradients(case, last, bias, narrow) -> None:
    *settings, height, width = case
    ours, plain = pair(3, 4, *settings, bias=bias)
    x = torch.randn(8, 3, height, width, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
        ours.to(memory_format=torch.channels_last)
    assert ours.meets(x) is not None
    found, wanted = [], []
    for module, kept in ((ours, found), (plain, wanted)):
        for create_graph in (False, True):
            free = x.clone().requires_grad_()
            y = module(free)
            loss = (y.square() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum()
            first = torch.autograd.grad(loss, [free, *module.parameters()], create_graph=create_graph)
            kept += [y, *first]
        kept += torch.autograd.grad(sum(g.pow(3).sum() for g in first), [free, module.weight])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert found[0].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("kind", ORDINARY)
def test_other_convolutions_stay_what_they_are(kind, narrow) -> None:
    ours, plain = pair(4, 4, **{"kernel_size": 3, "padding": 1, **ORDINARY[kind]})
    x = torch.randn(8, 4, 2, 2, dtype=torch.float64)
    assert ours.meets(x) is None
    assert torch.equal(ours(x), plain(x))


def test_where_nothing_is_won_it_is_bit_for_bit_the_convolution() -> None:
    ours, plain = pair(256, 512, 3, 1, 1)
    x = torch.randn(8, 256, 2, 2, dtype=torch.float64)
    assert ours.meets(x) is not None
    wide = torch.randn(8, 256, 5, 5, dtype=torch.float64)
    for few in (x[:7], wide):
        assert torch.equal(ours(few), plain(few))
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    narrow, plain = pair(64, 64, 3, 1, 1)
    assert torch.equal(narrow(x[:, :64]), plain(x[:, :64]))


def test_autocast_sums_in_32_bits(narrow) -> None:
    ours, plain = (module.float() for module in pair(3, 4, 3, 1, 1))
    x = torch.randn(8, 3, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(x), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert ours.weight.grad.dtype == torch.float32


def test_a_frozen_layer_passes_the_gradient_on(narrow) -> None:
    ours, plain = pair(3, 4, 3, 1, 1)
    ours.requires_grad_(False)
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(f(free).square().sum(), free)[0]
        for f in (ours, plain)
        for free in [x.clone().requires_grad_()]
    )
    torch.testing.assert_close(found, wanted)


def test_function_transforms_pass_through(narrow) -> None:
    ours, plain = pair(3, 4, 3, 1, 1)
    x = torch.randn(5, 8, 3, 2, 2, dtype=torch.float64)

    def loss(module, weight, x):
        return torch.func.functional_call(module, {"weight": weight, "bias": module.bias}, x).square().sum()

    found, wanted = (
        torch.func.vmap(torch.func.grad(partial(loss, module)), (None, 0))(module.weight.detach(), x)
        for module in (ours, plain)
    )
    torch.testing.assert_close(found, wanted)


def test_networks_spare_their_padding_and_keep_their_names() -> None:
    torch.manual_seed(0)
    network = Network(3, "resnet18", arguments={"zero_init_last": False})
    assert {type(part) for part in network.modules() if isinstance(part, nn.Conv2d)} == {SmallMapConv2d}
    plain = copy.deepcopy(network)
    for part in plain.modules():
        if type(part) is SmallMapConv2d:
            part.__class__ = nn.Conv2d
    assert [*plain.state_dict()] == [*network.state_dict()]
    x = torch.randn(8, 3, 64, 64)
    found, wanted = [], []
    for module, kept in ((network.double(), found), (plain.double(), wanted)):
        y = module(x.double())
        y.square().sum().backward()
        kept += [y, *(p.grad for p in module.parameters())]
    assert not torch.equal(found[0], wanted[0])  # the products were taken
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.save(network, io.BytesIO())


def test_subclasses_keep_their_kind() -> None:
    class Other(nn.Conv2d):
        pass

    module = nn.Sequential(Other(1, 1, 1), nn.Conv2d(1, 1, 1))
    spare_padding(module)
    assert [type(part) for part in module] == [Other, SmallMapConv2d]
