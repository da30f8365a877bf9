import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.errors import UserError
from zoo.optim import SAM, with_parameters


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3


def loss(module: nn.Module) -> torch.Tensor:
    return F.cross_entropy(module(X), Y)


def by_hand(module: nn.Module, rho: float, adaptive: bool = False, stability: float = 0.01) -> list[torch.Tensor]:
    """The gradient at the perturbed point, of a copy that is moved by loops over every parameter."""
    above = copy.deepcopy(module)
    gradients = torch.autograd.grad(loss(above), list(above.parameters()))
    total = 0.0
    for p, g in zip(above.parameters(), gradients, strict=True):
        t = p.detach().abs() + stability if adaptive else torch.ones_like(p)
        total = total + (t * g).square().sum()
    with torch.no_grad():
        for p, g in zip(above.parameters(), gradients, strict=True):
            t = p.abs() + stability if adaptive else torch.ones_like(p)
            p += rho * t * t * g / total.sqrt()
    return list(torch.autograd.grad(loss(above), list(above.parameters())))


@pytest.mark.parametrize("adaptive", [False, True])
def test_virtual_and_in_place_are_the_two_passes_written_out(adaptive) -> None:
    module, tool = network(), SAM(0.3, adaptive)
    wanted = by_hand(module, 0.3, adaptive)
    above = tool.perturbed(loss(module), dict(module.named_parameters()))
    assert all(p.grad is None for p in module.parameters())
    with_parameters(module, above, loss, module).backward()
    virtual = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    loss(module).backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    with tool.ascended(module):
        module.zero_grad()
        loss(module).backward()
    plain = torch.autograd.grad(loss(module), list(module.parameters()))
    for p, v, w, g in zip(module.parameters(), virtual, wanted, plain, strict=True):
        assert torch.allclose(v, w, atol=1e-13)
        assert torch.allclose(p.grad, w, atol=1e-13)
        assert not torch.allclose(w, g, atol=1e-4)
    with tool.ascended(module, gradients):
        given = loss(module).item()
    assert given > loss(module).item()


def test_length_and_direction() -> None:
    gradients = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    steps = SAM(0.5).perturbation(gradients)
    assert torch.allclose(steps["a"], torch.tensor([0.3, 0.0]))
    assert torch.allclose(steps["b"], torch.tensor([[0.4]]))
    # T = (2, 1), g = (3, 8): Tg = (6, 8) of length 10, T²g = (12, 8)
    parameters = {"a": torch.tensor([-2.0]), "b": torch.tensor([1.0])}
    gradients = {"a": torch.tensor([3.0]), "b": torch.tensor([8.0])}
    steps = SAM(1.0, adaptive=True, stability=0.0).perturbation(gradients, parameters)
    assert steps["a"].item() == pytest.approx(1.2)
    assert steps["b"].item() == pytest.approx(0.8)


def test_adaptive_does_not_see_a_rescaling_that_leaves_the_function_alone() -> None:
    tool, sharpness = SAM(0.5, adaptive=True, stability=0.0), []
    for scale in (1.0, 10.0):
        module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
        module.load_state_dict({k: v for k, v in network().state_dict().items() if "weight" in k}, strict=False)
        torch.manual_seed(3)
        for p in module.parameters():
            nn.init.normal_(p)
        with torch.no_grad():
            module[0].weight.mul_(scale)
            module[2].weight.div_(scale)
        above = tool.perturbed(loss(module), dict(module.named_parameters()))
        sharpness.append(with_parameters(module, above, loss, module).item())
    assert sharpness[0] == pytest.approx(sharpness[1], rel=1e-9)


def test_zero_radius_and_zero_gradient_change_nothing() -> None:
    module = network()
    above = SAM(0.0).perturbed(loss(module), dict(module.named_parameters()))
    assert all(torch.equal(above[name], p) for name, p in module.named_parameters())
    steps = SAM(100.0, adaptive=True).perturbation({"a": torch.zeros(3)}, {"a": torch.ones(3)})
    assert torch.equal(steps["a"], torch.zeros(3))
    assert SAM().perturbation({}) == {}


def test_weights_come_back_bit_for_bit_also_after_an_error() -> None:
    module = network().float()
    F.cross_entropy(module(X.float()), Y).backward()
    before = copy.deepcopy(module.state_dict())
    with SAM(1.7).ascended(module):
        assert not torch.equal(module[0].weight, before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(RuntimeError, match="stop"), SAM(1.7).ascended(module):
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_16_bit_casts_are_those_of_the_weights_at_hand() -> None:
    module, x = network().float(), X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        here = module(x)
        named = dict(module.named_parameters())
        found = torch.autograd.grad(here.sum(), list(named.values()))
        gradients = dict(zip(named, found, strict=True))
        with SAM(0.5).ascended(module, gradients):
            above = module(x)
        back = module(x)
    assert not torch.equal(above, here)
    assert torch.equal(back, here)


def test_running_statistics_move_in_the_first_pass_alone() -> None:
    module = network(norm=True)
    loss(module).backward()
    before = copy.deepcopy(module[1].state_dict())
    with SAM(1.0).ascended(module):
        assert torch.isfinite(loss(module))
    assert all(torch.equal(value, before[name]) for name, value in module[1].state_dict().items() if "run" in name)
    above = SAM(1.0).perturbed(loss(module), dict(module.named_parameters()))
    before = copy.deepcopy(module[1].state_dict())
    with frozen_batch_norm(module):
        with_parameters(module, above, loss, module)
    assert all(torch.equal(value, before[name]) for name, value in module[1].state_dict().items())


def test_parameters_that_do_not_learn_or_are_not_used_stay() -> None:
    module = network()
    module.more = nn.Linear(2, 2).double()
    module[0].weight.requires_grad_(False)
    used = dict(module.named_parameters())
    value = F.cross_entropy(module[3](module[2](module[0](X))), Y)
    above = SAM(0.1).perturbed(value, used)
    same = {name for name, p in used.items() if above[name] is p}
    assert same == {"0.weight", "more.weight", "more.bias"}


def test_refusals() -> None:
    with pytest.raises(UserError, match="rho=-1"):
        SAM(-1)
    with pytest.raises(UserError, match="stability"):
        SAM(stability=float("nan"))
    with pytest.raises(UserError, match="parameters"):
        SAM(adaptive=True).perturbation({"a": torch.ones(1)})
