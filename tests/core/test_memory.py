import pytest
import torch

from zoo.core.errors import UserError
from zoo.core.memory import MemoryBank


def rows(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers).unsqueeze(1)


def test_a_ring_overwrites_the_oldest() -> None:
    bank = MemoryBank(3, 1, label=torch.tensor(-1))
    bank.update(rows(1.0, 2.0), label=torch.tensor([1, 2]))
    assert bank.features.flatten().tolist() == [1.0, 2.0, 0.0]
    assert bank.label.tolist() == [1, 2, -1]
    assert bank.filled.tolist() == [True, True, False]
    assert not bank.full
    bank.update(rows(3.0, 4.0), label=torch.tensor([3, 4]))
    assert bank.features.flatten().tolist() == [4.0, 2.0, 3.0]
    assert bank.column("label").tolist() == [4, 2, 3]
    assert bank.full


def test_more_rows_than_room_keeps_the_last() -> None:
    bank, steps = MemoryBank(3, 1), MemoryBank(3, 1)
    bank.update(rows(*range(1, 6)))
    for number in range(1, 6):
        steps.update(rows(number))
    assert torch.equal(bank.features, steps.features)
    assert bank.position == steps.position


def test_slots_and_the_last_of_two_rows_for_one() -> None:
    bank = MemoryBank(4, 1, label=torch.tensor(0))
    bank.put(torch.tensor([2, 0, 2]), rows(1.0, 2.0, 3.0), label=torch.tensor([7, 8, 9]))
    assert bank.features.flatten().tolist() == [2.0, 0.0, 3.0, 0.0]
    assert bank.label.tolist() == [8, 0, 9, 0]
    assert bank.filled.tolist() == [True, False, True, False]


def test_nothing_moves_outside_training_and_nothing_is_changed_in_place() -> None:
    bank = MemoryBank(2, 1)
    held = bank.features
    bank.update(rows(5.0))
    assert not held.any()
    bank.eval()
    bank.update(rows(6.0))
    bank.put(torch.tensor([1]), rows(6.0))
    assert bank.features.flatten().tolist() == [5.0, 0.0]


def test_no_gradient_is_kept_and_half_precision_is_widened() -> None:
    bank = MemoryBank(2, 1)
    bank.update(rows(5.0).bfloat16().requires_grad_())
    assert not bank.features.requires_grad
    assert bank.features.dtype == torch.float32


def test_a_checkpoint_restores_rows_and_their_number() -> None:
    bank = MemoryBank(3, 2, label=torch.tensor(0))
    bank.update(torch.randn(4, 2), label=torch.arange(4))
    other = MemoryBank(0, 2, label=torch.tensor(0))
    other.load_state_dict(bank.state_dict())
    for b in (bank, other):
        b.update(torch.ones(2, 2), label=torch.tensor([8, 9]))
    for name, value in bank.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_two_ranks_hold_what_one_process_would(on_ranks) -> None:
    x, label, slots = torch.randn(6, 2), torch.arange(6), torch.tensor([0, 3, 1, 3, 2, 3])

    def fill(x, label, slots) -> list[torch.Tensor]:
        ring, keyed = (MemoryBank(4, 2, label=torch.tensor(0)) for _ in range(2))
        ring.update(x, label=label)
        ring.update(x, label=label)
        keyed.put(slots, x, label=label)
        return [*ring.state_dict().values(), *keyed.state_dict().values()]

    joint = MemoryBank(4, 2, label=torch.tensor(0))
    for _ in range(2):
        joint.update(x, label=label)
    wanted = fill(x, label, slots)
    for got in on_ranks(lambda rank: fill(*(t.chunk(2)[rank] for t in (x, label, slots)))):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_mistakes() -> None:
    with pytest.raises(UserError, match="size=-1"):
        MemoryBank(-1, 2)
    with pytest.raises(UserError, match="'filled'"):
        MemoryBank(1, 2, filled=torch.tensor(0))
    with pytest.raises(UserError, match=r"must be \['label'\]"):
        MemoryBank(1, 2, label=torch.tensor(0)).update(torch.zeros(1, 2))
