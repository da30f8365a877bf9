import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo.losses import divergence, virtual_adversarial_direction, virtual_adversarial_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "virtual_adversarial.json").read_text())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))


@pytest.mark.parametrize("epsilon", ["0.5", "6.0"])
def test_reference_figures(epsilon) -> None:
    given = {name: torch.tensor(v).double() for name, v in GOLDEN["inputs"].items()}
    x = given["x"]

    def call(z: Tensor) -> Tensor:
        return torch.tanh(z.flatten(1) @ given["w1"].T) @ given["w2"].T

    direction = virtual_adversarial_direction(call, x, call(x), given["start"], xi=GOLDEN["inputs"]["xi"])
    expected = GOLDEN["outputs"][epsilon]
    torch.testing.assert_close(direction, torch.tensor(expected["direction"]).double(), atol=1e-5, rtol=0)
    loss = virtual_adversarial_loss(call, x, call(x), direction, float(epsilon))
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_logistic_regression_is_attacked_along_its_weights(start) -> None:
    torch.manual_seed(start)
    w, x = torch.randn(7).double(), torch.randn(20, 7).double()

    def call(z: Tensor) -> Tensor:
        return torch.stack([z @ w, torch.zeros(len(z)).double()], dim=1)

    direction = virtual_adversarial_direction(call, x, call(x), torch.randn_like(x), xi=1e-4)
    torch.testing.assert_close(cosine(direction, w.expand_as(x)).abs(), torch.ones(20).double())
    # and the loss is the divergence of two Bernoullis, whose logits are |w| ε apart
    epsilon, p = 0.7, torch.sigmoid(x @ w)
    q = torch.sigmoid(x @ w + epsilon * (direction @ w))
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert virtual_adversarial_loss(call, x, call(x), direction, epsilon).item() == pytest.approx(expected.item())


def test_more_iterations_come_nearer_to_the_leading_eigenvector() -> None:
    torch.manual_seed(1)
    w, x = torch.randn(4, 9).double(), torch.randn(5, 9).double()

    def call(z: Tensor) -> Tensor:
        return z @ w.T

    p = call(x).softmax(1)
    curvature = torch.einsum("ci,bcd,dj->bij", w, p.diag_embed() - p[:, :, None] * p[:, None], w)
    leading = torch.linalg.eigh(curvature).eigenvectors[..., -1]
    start = torch.randn_like(x)
    found = [
        cosine(virtual_adversarial_direction(call, x, call(x), start, 1e-5, n), leading).abs() for n in (1, 5, 300)
    ]
    assert found[0].mean() < found[1].mean() < found[2].mean()
    torch.testing.assert_close(found[2], torch.ones(5).double(), atol=1e-3, rtol=0)


def test_the_loss_is_not_negative_zero_at_zero_and_larger_than_at_random() -> None:
    network, x = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)), torch.randn(50, 20)
    reference = network(x)
    direction = virtual_adversarial_direction(network, x, reference, torch.randn_like(x))
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(50))
    losses = [virtual_adversarial_loss(network, x, reference, direction, e).item() for e in (0.0, 0.1, 1.0)]
    assert losses[0] == pytest.approx(0.0, abs=1e-7)
    assert losses[0] < losses[1] < losses[2]
    random = nn.functional.normalize(torch.randn_like(x))
    assert losses[2] > 2 * virtual_adversarial_loss(network, x, reference, random, 1.0).item()
    assert (divergence(torch.randn(99, 4), torch.randn(99, 4)) >= 0).all()


def test_the_search_leaves_the_parameters_alone_and_the_reference_carries_no_gradient() -> None:
    network, x = nn.Linear(6, 3), torch.randn(4, 6, requires_grad=True)
    reference = network(x)
    direction = virtual_adversarial_direction(network, x, reference, torch.randn(4, 6))
    assert not direction.requires_grad
    assert [x.grad, network.weight.grad, network.bias.grad] == [None] * 3
    held = reference.detach().clone().requires_grad_()
    virtual_adversarial_loss(network, x, held, direction, 1.0).backward()
    assert held.grad is None
    assert network.weight.grad.abs().sum() > 0


def test_a_constant_network_has_no_direction() -> None:
    x = torch.randn(3, 2)
    direction = virtual_adversarial_direction(lambda z: 0 * z, x, 0 * x, torch.randn(3, 2))
    assert torch.equal(direction, torch.zeros(3, 2))


def test_the_default_step_is_felt_in_32_bits() -> None:
    network, x = nn.Sequential(nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10)), torch.randn(16, 784)
    start = torch.randn_like(x)
    ours = virtual_adversarial_direction(network, x, network(x), start)
    network.double()
    exact = virtual_adversarial_direction(network, x.double(), network(x.double()), start.double(), xi=1e-5)
    assert cosine(ours.double(), exact).min() > 0.99
