import math

import pytest
import torch
from torch import Tensor, nn

from zoo import EntMin, Supervised


class Given(nn.Module):
    """Logits are the input itself, times one weight."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class At(EntMin):
    progress = 1.0


def build(kind: type = At, **arguments) -> EntMin:
    method = kind(network=Given, num_classes=2, **arguments)
    method.configure_model()
    return method


def batch(weak: Tensor) -> dict[str, dict[str, Tensor]]:
    labeled = {"image": torch.tensor([[0.3, -0.2]]), "label": torch.tensor([1])}
    return {"labeled": labeled, "unlabeled": {"weak": weak}}


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_loss_by_hand(forward_pass) -> None:
    # the entropies of (1/2, 1/2) and (3/4, 1/4)
    weak = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    mean = (math.log(2) + math.log(4) - 0.75 * math.log(3)) / 2
    loss = build(unlabeled_weight=0.5, forward_pass=forward_pass).training_step(batch(weak), 0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.5)) + 0.5 * mean, rel=1e-6)


def test_descent_makes_predictions_surer() -> None:
    weak = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    build(unlabeled_weight=1.0).training_step(batch(weak), 0).backward()
    assert weak.grad[0, 0] < 0 < weak.grad[0, 1]
    assert weak.grad[1, 1] < 0 < weak.grad[1, 0]


def test_weight_zero_is_the_supervised_baseline_bit_for_bit() -> None:
    b = batch(torch.randn(4, 2))
    gradients = []
    for method in (build(unlabeled_weight=0.0), build(Supervised)):
        loss = method.training_step(b, 0)
        loss.backward()
        gradients.append((loss.detach(), method.network.scale.grad))
    assert all(map(torch.equal, *gradients))
