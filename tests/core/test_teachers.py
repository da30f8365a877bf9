import copy

import pytest
import torch
from torch import nn

from zoo.core.errors import UserError
from zoo.core.teachers import EMA, Frozen


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_update_is_the_closed_form() -> None:
    student = nn.Linear(1, 1, bias=False).double()
    student.weight.data.fill_(0.0)
    teacher = EMA(student, momentum=0.9)
    student.weight.data.fill_(1.0)
    for n in range(1, 6):
        teacher.update(student)
        assert teacher.module.weight.item() == pytest.approx(1 - 0.9**n, abs=1e-12)
        assert int(teacher.updates) == n


def test_warmup_follows_its_formula() -> None:
    student = nn.Linear(1, 1, bias=False).double()
    student.weight.data.fill_(0.0)
    teacher = EMA(student, momentum=0.3, warmup=True)
    student.weight.data.fill_(1.0)
    expected = 0.0
    for t in range(6):
        momentum = min(0.3, (1 + t) / (10 + t))
        expected = momentum * expected + 1 - momentum
        teacher.update(student)
        assert teacher.module.weight.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_limits(momentum: float) -> None:
    student = network()
    teacher = EMA(student, momentum)
    before = copy.deepcopy(teacher.module.state_dict())
    for p in student.parameters():
        p.data.add_(1.0)
    teacher.update(student)
    for name, p in teacher.module.named_parameters():
        assert torch.equal(p, before[name] if momentum else student.state_dict()[name])


def test_buffers_are_copied_and_integers_stay_integers() -> None:
    student = network()
    teacher = EMA(student, 0.99)
    for _ in range(3):
        student(torch.randn(8, 3))
    teacher.update(student)
    assert torch.equal(teacher.module[1].running_mean, student[1].running_mean)
    assert int(teacher.module[1].num_batches_tracked) == 3
    assert teacher.module[1].num_batches_tracked.dtype == torch.long


def test_shares_no_storage_and_never_learns() -> None:
    student = network()
    teacher = EMA(student)
    pointers = {t.data_ptr() for t in student.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in teacher.module.state_dict().values()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(torch.randn(4, 3, requires_grad=True)).requires_grad


def test_eval_is_pinned() -> None:
    for teacher in (EMA(network()), Frozen(network())):
        assert not any(m.training for m in teacher.modules())
        parent = nn.ModuleList([teacher]).train()
        assert parent.training
        assert not any(m.training for m in teacher.modules())


def test_resumes_exactly_and_survives_moves() -> None:
    student = network()
    whole = EMA(student, 0.9, warmup=True)
    states = [copy.deepcopy(student)]
    for _ in range(4):
        for p in student.parameters():
            p.data.add_(torch.randn_like(p))
        states.append(copy.deepcopy(student))
    resumed = EMA(states[0], 0.9, warmup=True)
    for state in states[1:]:
        whole.update(state)
    for state in states[1:3]:
        resumed.update(state)
    fresh = EMA(states[0], 0.9, warmup=True)
    fresh.load_state_dict(resumed.state_dict())
    fresh = fresh.double().float()
    for state in states[3:]:
        fresh.update(state)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_bad_momentum() -> None:
    with pytest.raises(UserError, match=r"momentum=1.5 must lie in \[0, 1\]"):
        EMA(network(), 1.5)


@pytest.mark.parametrize("warmup", [False, True])
def test_approach_moves_the_weights_as_an_update_would_and_nothing_else(warmup) -> None:
    student = network()
    one, other = EMA(student, 0.9, warmup), EMA(student, 0.9, warmup)
    for _ in range(2):
        student(torch.randn(5, 3))
        for p in student.parameters():
            p.data.add_(torch.randn_like(p))
        one.update(student)
        other.update(student)
        for p in student.parameters():
            p.data.add_(torch.randn_like(p))
        student(torch.randn(5, 3))
        buffers = [buffer.clone() for buffer in other.module.buffers()]
        other.approach([p.detach() for p in student.parameters()])
        assert other.updates == one.updates
        assert all(torch.equal(a, b) for a, b in zip(buffers, other.module.buffers(), strict=True))
        one.update(student)
        one._count, one.updates = other._count, other.updates.clone()
        assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True))
