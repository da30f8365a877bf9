import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from zoo import LOOK
from zoo.core.errors import UserError
from zoo.losses import nearest_neighbor_loss


class Small(nn.Module):
    """A network of features and a head, without BatchNorm."""

    num_features = 5

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, num_outputs)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


def built(**arguments) -> LOOK:
    torch.manual_seed(3)
    method = LOOK(network=Small, num_classes=2, **{"memory_size": 10, "neighbors": 3, **arguments})
    method.configure_model()
    return method


def batch(seed: int, index: list[int]) -> dict[str, dict[str, Tensor]]:
    x = torch.randn(len(index), 4, generator=torch.Generator().manual_seed(seed))
    index = torch.tensor(index)
    return {"labeled": {"image": x, "label": index % 2, "index": index}}


def test_three_steps_fill_the_queue_with_the_averages_features_and_leave_samples_out_of_their_own_neighbours() -> None:
    method, steps = built(), [batch(0, [0, 1, 2, 3]), batch(1, [2, 3, 4, 5]), batch(2, [0, 2, 6, 7])]
    rows = []
    for step in steps:
        with torch.no_grad():
            method.teacher.module.body.bias += 0.1  # so that average and student differ
        labeled = step["labeled"]
        rows += list(zip(method.teacher.module.features(labeled["image"]), labeled["index"].tolist(), strict=True))
        loss = method.training_step(step, 0)
        kept = rows[-10:]
        memory = normalize(torch.stack([feature for feature, _ in kept]), dim=1)
        numbers = torch.tensor([number for _, number in kept])
        f = method.network.features(labeled["image"])
        expected = nearest_neighbor_loss(
            normalize(f, dim=1),
            labeled["label"],
            memory,
            numbers % 2,
            3,
            0.1,
            excluded=labeled["index"].unsqueeze(1) == numbers,
        ).mean() + cross_entropy(method.network.logits(f), labeled["label"])
        torch.testing.assert_close(loss, expected)
    assert int(method.memory.filled.sum()) == 10


def test_the_head_does_not_shape_the_features() -> None:
    method, step = built(), batch(0, [0, 1, 2, 3, 4, 5])
    with torch.no_grad():
        method.network.head.weight *= 100  # a gradient through the head would be seen
    method.training_step(step, 0).backward()
    f = method.network.features(step["labeled"]["image"])
    loss = nearest_neighbor_loss(
        normalize(f, dim=1),
        step["labeled"]["label"],
        method.memory.features,
        method.memory.column("label"),
        3,
        0.1,
        step["labeled"]["index"].unsqueeze(1) == method.memory.column("index"),
    ).mean()
    (expected,) = torch.autograd.grad(loss, method.network.body.weight)
    torch.testing.assert_close(method.network.body.weight.grad, expected)
    assert method.network.head.weight.grad.any()
    assert all(p.grad is None for p in method.teacher.parameters())


def test_the_queue_is_in_the_checkpoint() -> None:
    method, other = built(), built()
    method.training_step(batch(0, [0, 1, 2, 3]), 0)
    other.load_state_dict(method.state_dict())
    step = batch(1, [4, 5, 6, 7])
    assert torch.equal(method.training_step(step, 0), other.training_step(step, 0))


@pytest.mark.parametrize("arguments", [{"neighbors": 0}, {"memory_size": 0}, {"temperature": 0.0}])
def test_out_of_range(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        built(**arguments)
