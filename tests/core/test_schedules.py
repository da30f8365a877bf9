import math

import pytest
import torch

from zoo.core.schedules import (
    CosineLR,
    InverseDecayLR,
    PolynomialDecayLR,
    cosine_decay,
    dann_ramp,
    linear_ramp,
    sigmoid_ramp,
)


def test_ramps_at_hand_values() -> None:
    assert [linear_ramp(p, 0.5) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert linear_ramp(0.0, 0.0) == 1.0
    assert sigmoid_ramp(0.0) == pytest.approx(math.exp(-5))
    assert sigmoid_ramp(1.0) == 1.0
    assert dann_ramp(0.0) == 0.0
    assert dann_ramp(0.5) == pytest.approx(0.9866143)  # 2 / (1 + e^-5) - 1
    assert dann_ramp(1.0) == pytest.approx(0.9999092)


def test_cosines() -> None:
    assert [round(cosine_decay(p), 12) for p in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]
    assert cosine_decay(1.0, cycles=7 / 32) == pytest.approx(math.cos(7 * math.pi / 16))
    assert cosine_decay(1.0, floor=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (CosineLR, [1.0, 0.5, 0.0]),
        (PolynomialDecayLR, [1.0, 0.5**0.9, 0.0]),
        (InverseDecayLR, [1.0, 6**-0.75, 11**-0.75]),
    ],
)
def test_learning_rates(schedule: type, expected: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = schedule(optimizer, total_steps=10)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    assert [rates[0], rates[5], rates[10]] == pytest.approx(expected)


def test_warmup_is_linear_and_state_is_plain() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = CosineLR(optimizer, total_steps=12, warmup_steps=4)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert all(not callable(value) for value in scheduler.state_dict().values())
