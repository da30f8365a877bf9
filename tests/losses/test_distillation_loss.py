import math

import pytest
import torch
import torch.nn.functional as F

from zoo.losses import distillation_loss


def test_hand_figure() -> None:
    # T = 2: q = softmax(ln 9 / 2, 0) = (3, 1) / 4, p = (1, 1) / 2
    teacher, student = torch.tensor([[math.log(9.0), 0.0]], dtype=torch.float64), torch.zeros(1, 2).double()
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(4 * divergence, rel=1e-12)
    assert distillation_loss(student, teacher, 2.0, squared=False).item() == pytest.approx(divergence, rel=1e-12)


def test_sum_over_classes_mean_over_samples() -> None:
    student, teacher = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    q, p = (teacher / 3).softmax(1), (student / 3).softmax(1)
    by_hand = 9 * sum(float((q[i] * (q[i] / p[i]).log()).sum()) for i in range(5)) / 5
    assert distillation_loss(student, teacher, 3.0).item() == pytest.approx(by_hand, rel=1e-12)


def test_high_temperature_is_the_squared_distance_of_centred_logits() -> None:
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = centred.square().sum() / (2 * 6 * 4)
    assert distillation_loss(student, teacher, 1e4).item() == pytest.approx(float(limit), rel=1e-3)


def test_gradient_is_that_of_soft_cross_entropy_and_of_the_paper() -> None:
    temperature, teacher = 3.0, torch.randn(5, 4).double()
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    q, p = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    (ours,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
    (cross,) = torch.autograd.grad(temperature**2 * F.cross_entropy(student / temperature, q), student)
    assert torch.allclose(ours, cross, atol=1e-12)
    assert torch.allclose(ours, temperature * (p - q).detach() / 5, atol=1e-12)


def test_zero_when_equal_and_blind_to_a_shift() -> None:
    logits = torch.randn(4, 3).double()
    assert distillation_loss(logits, logits).item() == pytest.approx(0, abs=1e-15)
    assert distillation_loss(logits + 5, logits).item() == pytest.approx(0, abs=1e-14)


def test_teacher_gets_no_gradient() -> None:
    teacher, student = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_sure_logits_stay_finite_and_half_precision_is_computed_in_32_bits() -> None:
    student, teacher = torch.tensor([[300.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 300.0]])
    loss = distillation_loss(student, teacher, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(300)
    assert torch.isfinite(student.grad).all()
    assert distillation_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_empty_batch_is_zero() -> None:
    assert distillation_loss(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="temperature=0"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match=r"\(1, 2\) and teacher logits \(1, 3\)"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 3))
