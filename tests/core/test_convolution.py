import copy
import io

import pytest
import torch
from torch import nn

from zoo.core.convolution import SmallMapConv2d, spare_padding
from zoo.core.network import Network

# kernel, stride, padding, height, width
COVERED = [
    (3, 1, 1, 2, 2),
    (3, 1, 1, 1, 1),
    (3, 1, 1, 1, 2),
    (3, 2, 1, 2, 2),
    (5, 1, 2, 3, 2),
    (7, 2, 3, 4, 3),
    ((3, 5), (1, 2), (1, 2), 2, 3),
]
ORDINARY = [
    (3, 1, 1, 3, 3),  # corners do not meet
    (3, 1, 1, 2, 3),
    (3, 2, 1, 4, 4),
    (3, 1, 0, 3, 3),  # nothing to save
    (1, 1, 0, 1, 1),
    (2, 1, 1, 2, 1),  # even kernels have positions of padding alone
]


def layer(kernel, stride, padding, **more) -> tuple[SmallMapConv2d, nn.Conv2d]:
    torch.manual_seed(0)
    ours = SmallMapConv2d(3, 4, kernel, stride, padding, **more).double()
    plain = nn.Conv2d(3, 4, kernel, stride, padding, **more).double()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", COVERED)
def test_product_is_the_convolution_with_its_gradients(case, bias, last) -> None:
    *settings, height, width = case
    ours, plain = layer(*settings, bias=bias)
    assert ours.taps(height, width) is not None
    x = torch.randn(32, 3, height, width, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
        ours.to(memory_format=torch.channels_last)
    found, wanted = [], []
    for module, kept in ((ours, found), (plain, wanted)):
        free = x.clone().requires_grad_()
        y = module(free)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        first = torch.autograd.grad((y.square() * weights).sum(), [free, *module.parameters()], create_graph=True)
        second = torch.autograd.grad(first[0].pow(3).sum(), [free, module.weight])
        kept += [y, *first, *second]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not last or found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", ORDINARY)
def test_kernels_that_do_not_cover_stay_convolutions(case) -> None:
    *settings, height, width = case
    ours, plain = layer(*settings)
    assert ours.taps(height, width) is None
    x = torch.randn(32, 3, height, width, dtype=torch.float64)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize(
    "more", [{"groups": 3}, {"dilation": 2}, {"padding_mode": "reflect"}, {"padding": "same"}], ids=str
)
def test_other_kinds_stay_convolutions(more) -> None:
    settings = {"padding": 1, **more}
    ours = SmallMapConv2d(3, 3, 3, **settings)
    plain = nn.Conv2d(3, 3, 3, **settings)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(32, 3, 2, 2)
    assert ours.taps(2, 2) is None
    if "dilation" not in more:
        assert torch.equal(ours(x), plain(x))


def test_fewer_samples_and_inference_are_bit_for_bit_the_convolution() -> None:
    ours, plain = layer(3, 1, 1)
    x = torch.randn(40, 3, 2, 2, dtype=torch.float64)
    assert torch.equal(ours(x[:31]), plain(x[:31]))
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


def test_networks_spare_their_padding_and_keep_names_and_bits() -> None:
    torch.manual_seed(0)
    network = Network(3, "resnet18")
    kinds = {type(part) for part in network.modules() if isinstance(part, nn.Conv2d)}
    assert kinds == {SmallMapConv2d}
    plain = copy.deepcopy(network)
    for part in plain.modules():
        if type(part) is SmallMapConv2d:
            part.__class__ = nn.Conv2d
    assert [*plain.state_dict()] == [*network.state_dict()]
    x = torch.randn(32, 3, 32, 32)
    ours, theirs = network(x), plain(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    ours.sum().backward()
    theirs.sum().backward()
    deep = "backbone.model.layer4.1.conv2.weight"
    torch.testing.assert_close(network.get_parameter(deep).grad, plain.get_parameter(deep).grad, rtol=1e-2, atol=1e-3)
    file = io.BytesIO()
    torch.save(network, file)


def test_subclasses_keep_their_kind() -> None:
    class Other(nn.Conv2d):
        pass

    module = nn.Sequential(Other(1, 1, 1), nn.Conv2d(1, 1, 1))
    spare_padding(module)
    assert [type(part) for part in module] == [Other, SmallMapConv2d]
