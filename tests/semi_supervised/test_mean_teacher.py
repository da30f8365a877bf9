import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zoo import MeanTeacher, Supervised
from zoo.core.errors import UserError


class Given(nn.Module):
    """Logits are the input itself, times one weight."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Noisy(nn.Sequential):
    """A network with BatchNorm and dropout."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(), nn.Linear(16, num_outputs))


def mean_teacher(network=Given, num_classes=2, **arguments) -> MeanTeacher:
    method = MeanTeacher(network=network, num_classes=num_classes, **{"ramp": 0.0, **arguments})
    method.configure_model()
    return method


def batch(x: list, weak: list, weak_2: list) -> dict[str, dict[str, Tensor]]:
    return {
        "labeled": {"image": torch.tensor(x), "label": torch.zeros(len(x), dtype=torch.long)},
        "unlabeled": {"weak": torch.tensor(weak), "weak_2": torch.tensor(weak_2)},
    }


LOG3 = math.log(3.0)
EXAMPLE = ([[0.0, 0.0]], [[LOG3, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])


def random_batch() -> dict[str, dict[str, Tensor]]:
    return {
        "labeled": {"image": torch.randn(5, 3), "label": torch.randint(4, (5,))},
        "unlabeled": {"weak": torch.randn(7, 3), "weak_2": torch.randn(7, 3)},
    }


def test_loss_by_hand() -> None:
    # the teacher says (3/4, 1/4) and (1/2, 1/2), the student twice (1/2, 1/2): mean square 2 * (1/4)^2 / 4 = 1/32
    loss = mean_teacher(unlabeled_weight=8.0).training_step(batch(*EXAMPLE), 0)
    assert loss.item() == pytest.approx(math.log(2) + 8 / 32)


def test_the_teacher_sees_the_first_view_with_its_own_weights() -> None:
    method = mean_teacher(unlabeled_weight=8.0)
    method.teacher.module.scale.data.zero_()  # it says (1/2, 1/2) of everything, as the student does of the second view
    assert method.training_step(batch(*EXAMPLE), 0).item() == pytest.approx(math.log(2))
    method.network.scale.data.zero_()
    method.teacher.module.scale.data.fill_(1.0)
    assert method.training_step(batch(*EXAMPLE), 0).item() == pytest.approx(math.log(2) + 8 / 32)


def test_consistency_is_there_and_pulls_elsewhere_than_the_labels() -> None:
    method = mean_teacher(partial(Noisy), 4, teacher_mode="eval").eval()
    b = random_batch()
    terms = method.losses(b, outputs := method.student(b), method.targets(b, outputs))
    assert terms["consistency"] > 0
    parameters = list(method.network.parameters())
    supervised, consistency = (
        torch.cat([g.flatten() for g in torch.autograd.grad(terms[name], parameters, retain_graph=True)])
        for name in ("supervised", "consistency")
    )
    assert consistency.norm() > 0
    assert abs(torch.cosine_similarity(supervised, consistency, dim=0)) < 0.99


def test_equal_views_and_weights_agree() -> None:
    b = random_batch()
    b["unlabeled"]["weak_2"] = b["unlabeled"]["weak"]
    method = mean_teacher(partial(Noisy), 4, teacher_mode="eval").eval()
    outputs = method.student(b)
    assert method.losses(b, outputs, method.targets(b, outputs))["consistency"].item() == pytest.approx(0, abs=1e-12)


def test_targets_carry_no_gradient() -> None:
    method = mean_teacher()
    b = batch(*EXAMPLE)
    b["unlabeled"]["weak"].requires_grad_()
    method.training_step(b, 0).backward()
    assert b["unlabeled"]["weak"].grad is None
    assert method.teacher.module.scale.grad is None


def test_weight_zero_is_the_supervised_baseline_bit_for_bit() -> None:
    b = batch([[1.0, -2.0], [0.3, 0.1]], *EXAMPLE[1:])
    supervised = Supervised(network=Given, num_classes=2)
    supervised.configure_model()
    method = mean_teacher(unlabeled_weight=0.0)
    losses = [m.training_step(b, 0) for m in (method, supervised)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(method.network.scale.grad, supervised.network.scale.grad)


def test_order_of_unlabeled_samples_does_not_matter() -> None:
    method = mean_teacher(partial(Noisy), 4, teacher_mode="eval").eval()
    b, order = random_batch(), torch.randperm(7)
    permuted = {**b, "unlabeled": {name: view[order] for name, view in b["unlabeled"].items()}}
    torch.testing.assert_close(method.training_step(b, 0), method.training_step(permuted, 0))


@pytest.mark.parametrize(("ramp", "expected"), [(0.0, 1.0), (0.4, math.exp(-5 * 0.25)), (0.2, 1.0)])
def test_the_ramp_is_a_sigmoid_of_progress(ramp, expected, monkeypatch) -> None:
    monkeypatch.setattr(MeanTeacher, "progress", 0.2)
    loss = mean_teacher(unlabeled_weight=8.0, ramp=ramp).training_step(batch(*EXAMPLE), 0)
    assert loss.item() == pytest.approx(math.log(2) + expected * 8 / 32)


def test_teacher_modes() -> None:
    b = random_batch()
    method = mean_teacher(partial(Noisy), 4, teacher_mode="eval")
    teacher = method.teacher
    calm, _ = method.targets(b, ())
    assert torch.equal(calm, teacher(b["unlabeled"]["weak"]).softmax(1))
    assert not teacher.module[1].num_batches_tracked
    method = mean_teacher(partial(Noisy), 4, teacher_mode="train")
    first, second = (method.targets(b, ())[0] for _ in range(2))
    assert not torch.equal(first, second)  # dropout
    assert method.teacher.module[1].num_batches_tracked == 2  # and batch statistics
    assert not any(part.training for part in method.teacher.modules())


@pytest.mark.parametrize("warmup", [True, False])
def test_warm_up_is_the_averages(warmup) -> None:
    method = mean_teacher(warmup=warmup)
    method.network.scale.data.fill_(3.0)
    method.teacher.update(method.network)
    assert method.teacher.module.scale.item() == pytest.approx(2.8 if warmup else 1.002)  # m = 1 / 10 or 0.999


@pytest.mark.parametrize("arguments", [{"unlabeled_weight": -1.0}, {"ramp": 1.5}, {"teacher_mode": "trian"}])
def test_out_of_range(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        mean_teacher(**arguments)
