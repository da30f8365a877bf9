import copy
import math

import pytest
import torch
from torch import Tensor, nn

from zoo.core.errors import UserError
from zoo.optim import (
    Virtual,
    averaged_gradients,
    check_virtual,
    clipped_gradients,
    in_layout_of,
    kept_buffers,
    virtual_gradients,
    virtual_start,
    virtual_step,
    with_parameters,
)

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
    "fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss_of(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().mean()


def named_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


def train(module: nn.Module, optimizer: torch.optim.Optimizer, *inputs: Tensor) -> None:
    for x in inputs:
        optimizer.zero_grad()
        loss_of(module, x).backward()
        optimizer.step()


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_virtual_steps_are_the_optimizers_own_bit_for_bit_and_move_nothing(name, warm) -> None:
    kind, arguments = OPTIMIZERS[name]
    module = network()
    optimizer = kind([{"params": module[0].parameters()}, {"params": module[2].parameters(), "lr": 0.003}], **arguments)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)  # it replaces `optimizer.step`
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    calls = []
    inputs = torch.randn(5, 7, 3, dtype=torch.float64)
    train(module, optimizer, *inputs[:warm])
    twin, twin_optimizer = copy.deepcopy((module, optimizer))
    optimizer.zero_grad()
    calls.clear()
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))

    named = named_of(module)
    virtual = virtual_start(optimizer, named)
    for x in inputs[warm : warm + 3]:
        loss = with_parameters(module, virtual.parameters, loss_of, module, x)
        virtual = virtual_step(optimizer, named, virtual, virtual_gradients(loss, virtual.parameters))
    assert not calls
    train(twin, twin_optimizer, *inputs[warm : warm + 3])
    for parameter_name, p in twin.named_parameters():
        assert torch.equal(virtual.parameters[parameter_name], p)
        for key, value in twin_optimizer.state[p].items():
            mine = virtual.state[parameter_name][key]
            assert torch.equal(mine, value) if isinstance(value, Tensor) else mine == value

    after = module.state_dict(), optimizer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    assert str(before[1]) == str(after[1])
    assert all(p.grad is None for p in module.parameters())
    train(module, optimizer, inputs[4])  # the original still works


def test_nesterov_by_hand() -> None:
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.2)
    optimizer.state[p]["momentum_buffer"] = torch.tensor([4.0])
    virtual = virtual_step(optimizer, {"p": p}, virtual_start(optimizer, {"p": p}), {"p": torch.tensor([2.8])})
    # g = 2.8 + 0.2 = 3; buffer = 0.5 * 4 + 3 = 5; direction = 3 + 0.5 * 5 = 5.5
    assert virtual.parameters["p"].item() == pytest.approx(1 - 0.55)
    assert virtual.state["p"]["momentum_buffer"].item() == pytest.approx(5.0)
    assert optimizer.state[p]["momentum_buffer"].item() == 4.0


def test_adamw_by_hand() -> None:
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.5, 0.75), eps=0.0, weight_decay=0.5)
    optimizer.state[p].update(step=torch.tensor(1.0), exp_avg=torch.tensor([2.0]), exp_avg_sq=torch.tensor([4.0]))
    virtual = virtual_step(optimizer, {"p": p}, virtual_start(optimizer, {"p": p}), {"p": torch.tensor([6.0])})
    # moments 4 and 12, corrected by 1 - 0.25 and 1 - 0.5625
    assert virtual.parameters["p"].item() == pytest.approx(0.95 - 0.1 * (4 / 0.75) / math.sqrt(12 / 0.4375))


def test_a_given_rate_is_multiplied_by_the_groups() -> None:
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [a], "lr": 9.0}, {"params": [b], "lr": 9.0, "lr_multiplier": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    named = {"a": a, "b": b}
    gradients = {"a": torch.ones(1), "b": torch.ones(1)}
    virtual = virtual_step(optimizer, named, virtual_start(optimizer, named), gradients, lr=2.0)
    assert virtual.parameters["a"].item() == -2.0
    assert virtual.parameters["b"].item() == pytest.approx(-0.2)


def test_what_has_no_gradient_or_another_optimizer_stays() -> None:
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.AdamW([a, b], lr=1.0, weight_decay=1.0)
    named = {"a": a, "b": b, "c": c}
    virtual = virtual_step(optimizer, named, virtual_start(optimizer, named), {"a": a.detach(), "c": c.detach()})
    assert virtual.parameters["a"].item() != 1.0
    assert virtual.parameters["b"] is b
    assert virtual.parameters["c"] is c
    assert virtual.state.keys() == named.keys()
    assert not optimizer.state


class Lookahead(torch.optim.SGD):
    """One that is not torch's."""


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Lookahead])
def test_other_optimizers_are_refused(kind) -> None:
    optimizer = kind([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(UserError, match=kind.__name__):
        check_virtual(optimizer)
    with pytest.raises(UserError):
        virtual_step(optimizer, {}, Virtual({}, {}), {})


def test_gradients_leave_those_of_the_parameters_alone_and_can_be_taken_twice() -> None:
    module, unused = network(), nn.Parameter(torch.ones(1))
    parameters = {**named_of(module), "unused": unused}
    loss = loss_of(module, torch.randn(2, 3, dtype=torch.float64))
    first = virtual_gradients(loss, parameters, keep_graph=True)
    assert all(p.grad is None for p in module.parameters())
    assert set(first) == set(named_of(module))
    loss.backward()
    assert all(torch.equal(first[name], p.grad) for name, p in module.named_parameters())


@pytest.mark.parametrize("limit", [0.01, 100.0])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_torchs(algorithm, limit) -> None:
    module = network()
    loss_of(module, torch.randn(5, 3, dtype=torch.float64)).backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    clipped = clipped_gradients(gradients, limit, algorithm)
    clip = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
    clip(module.parameters(), limit)
    for name, p in module.named_parameters():
        torch.testing.assert_close(clipped[name], p.grad)
    assert clipped_gradients(gradients, None) is gradients
    assert clipped_gradients(gradients, 0.0) is gradients


def test_gradients_of_two_ranks_are_averaged_in_one_piece(on_ranks) -> None:
    gradients = [{"a": torch.randn(2, 3), "b": torch.randn(())} for _ in range(2)]
    for result in on_ranks(lambda rank: averaged_gradients(gradients[rank])):
        for name in ("a", "b"):
            torch.testing.assert_close(result[name], (gradients[0][name] + gradients[1][name]) / 2)
    assert averaged_gradients(gradients[0]) is gradients[0]


def test_buffers_are_kept_also_when_something_fails() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    own = dict(module.named_buffers())
    values = {name: buffer.clone() for name, buffer in own.items()}

    def failing() -> None:
        with kept_buffers(module, but=[module[1]]):
            module(torch.randn(4, 3))
            assert not torch.equal(module[0].running_mean, values["0.running_mean"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    for name, buffer in module.named_buffers():
        assert buffer is own[name]
        assert torch.equal(buffer, values[name]) == name.startswith("0")


def test_other_parameters_are_held_only_during_the_call() -> None:
    module = nn.Linear(2, 1, bias=False)
    own = module.weight
    x = torch.randn(4, 2)
    output = with_parameters(module, {"weight": torch.zeros(1, 2)}, lambda: module(x))
    assert not output.any()
    assert module.weight is own


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_steps_with_gradients_of_another_layout(kind, last) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 4, 3, bias=False)
    given = torch.randn_like(module.weight)
    if last:
        module.to(memory_format=torch.channels_last)
    else:
        given = given.contiguous(memory_format=torch.channels_last)
    made = []
    for fused in (False, True):
        optimizer = kind(module.parameters(), lr=0.1, fused=fused)
        named = named_of(module)
        made.append(virtual_step(optimizer, named, virtual_start(optimizer, named), {"weight": given}).parameters)
    torch.testing.assert_close(made[0]["weight"], made[1]["weight"])
    assert torch.equal(in_layout_of(module.weight, given), given)
    assert in_layout_of(given, given) is given
