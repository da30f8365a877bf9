import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from zoo import KnowledgeDistillation, Supervised
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.distillation.output_cache import OutputCache
from zoo.losses import distillation_loss

NETWORK = partial(Network, backbone="lenet", in_channels=1)
LARGE = partial(Network, backbone="lenet", in_channels=1, arguments={"width": 2, "norm": True})
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def batch(size: int = 6) -> dict:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 1, 28, 28, generator=generator)
    labels = torch.randint(3, (size,), generator=generator)
    return {"labeled": {"image": images, "label": labels, "index": torch.arange(size) * 7 + 2}}


def method(cls: type = KnowledgeDistillation, **arguments):
    if cls is KnowledgeDistillation:
        arguments = {"teacher": LARGE, **arguments}
    torch.manual_seed(0)
    made = cls(network=NETWORK, num_classes=3, optimizer=SGD, **arguments)
    made.configure_model()
    return made


def train(made, steps: int = 3) -> None:
    optimizer = made.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        made.training_step(batch(), 0).backward()
        optimizer.step()


@pytest.mark.parametrize(("arguments", "weights"), [({}, (0.1, 0.9)), ({"alpha": 0.5, "label_weight": 1.0}, (1, 0.5))])
def test_loss_is_the_weighted_sum(arguments, weights) -> None:
    made = method(temperature=3.0, **arguments)
    b = batch()["labeled"]
    logits, taught = made.network(b["image"]), made.frozen_teacher(b["image"])
    labels = -logits.log_softmax(1)[torch.arange(6), b["label"]].mean()
    wanted = weights[0] * labels + weights[1] * distillation_loss(logits, taught, 3.0)
    assert made.training_step(batch(), 0).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_alpha_zero_is_supervised_bit_for_bit() -> None:
    ours, baseline = method(alpha=0.0), method(Supervised)
    assert torch.equal(torch.rand(2), (method(Supervised), torch.rand(2))[1])  # nor does the teacher draw numbers
    train(ours)
    train(baseline)
    for a, b in zip(ours.network.parameters(), baseline.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_teacher_never_moves() -> None:
    made = method()
    before = copy.deepcopy(made.frozen_teacher.state_dict())
    made.train()
    train(made)
    assert not any(module.training for module in made.frozen_teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in made.frozen_teacher.parameters())
    for name, value in made.frozen_teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_student_learns_the_teacher_when_it_only_looks_at_it() -> None:
    made = method(alpha=1.0)
    b = batch()["labeled"]
    first = made.training_step(batch(), 0).item()
    train(made, 60)
    assert made.training_step(batch(), 0).item() < 0.1 * first
    assert torch.equal(made.network(b["image"]).argmax(1), made.frozen_teacher(b["image"]).argmax(1))


def test_the_student_is_what_predicts() -> None:
    made = method()
    assert made.predictor is made.network
    assert "teacher.module.head.weight" not in made.state_dict()  # that name is the average which is evaluated


def test_untrained_teacher_is_refused(tmp_path) -> None:
    made = method()
    with pytest.raises(UserError, match="random weights"):
        made.on_fit_start()
    method(allow_untrained_teacher=True).on_fit_start()
    weights = tmp_path / "teacher.pt"
    torch.save(LARGE(3).state_dict(), weights)
    trained = method(teacher=partial(LARGE, weights=str(weights)))
    trained.on_fit_start()
    for name, value in torch.load(weights).items():
        assert torch.equal(trained.frozen_teacher.module.state_dict()[name], value), name
    made.load_state_dict(trained.state_dict())  # a checkpoint brings its teacher and says that it was trained
    made.on_fit_start()


def test_a_fit_stops_before_it_starts() -> None:
    with pytest.raises(UserError, match="random weights"):
        Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(
            method(), torch.utils.data.DataLoader([0])
        )


def test_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(UserError, match="the teacher has 5 classes, the data 3"):
        method(teacher=lambda num_classes: LARGE(5))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        method(alpha=1.5)
    with pytest.raises(ValueError, match="temperature=0"):
        method(temperature=0)


class Counting(nn.Module):
    """Counts the images that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return x.flatten(1)[:, :3] * 2


def test_cache_asks_once_and_answers_the_same() -> None:
    network, cache, x = Counting(), OutputCache(), torch.randn(10, 1, 4, 4)
    for index in ([0, 3, 5], [3, 9, 0], [9, 5], [1, 2]):
        rows = torch.tensor(index)
        assert torch.equal(cache(network, x[rows], rows), Counting()(x[rows]))
    assert network.seen == 6


def test_cache_grows_with_the_numbers() -> None:
    network, cache, x = Counting(), OutputCache(), torch.randn(4, 5)
    cache(network, x[:2], torch.tensor([1, 2]))
    cache(network, x[2:], torch.tensor([1000, 7]))
    assert torch.equal(cache(network, x, torch.tensor([1, 2, 1000, 7])), x[:, :3] * 2)
    assert network.seen == 4


def test_cache_refuses_random_views() -> None:
    made = method(cache_teacher=True)
    without = method()
    for _ in range(2):
        assert torch.equal(made.training_step(batch(), 0), without.training_step(batch(), 0))
    changed = batch()
    changed["labeled"]["image"][4] = changed["labeled"]["image"][4].flip(-1)
    with pytest.raises(UserError, match="cache_teacher=True: sample 30 came with another image"):
        made.training_step(changed, 0)
