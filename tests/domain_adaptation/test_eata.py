import math
from functools import partial

import pytest
import torch

from zoo import EATA, Tent
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.losses import entropy

NETWORK = partial(Network, backbone="tiny_cnn", in_channels=1, arguments={"width": 4})
SGD = partial(torch.optim.SGD, lr=0.5)


def method(make=EATA, **arguments):
    torch.manual_seed(1)
    if make is EATA:
        arguments = {"fisher_weight": 0.0, "redundancy_margin": None, **arguments}
    made = make(network=NETWORK, num_classes=3, adaptation_optimizer=SGD, **arguments)
    made.configure_model()
    made.eval()._adapts = True
    return made


def batches(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 8, 1, 12, 12, generator=torch.Generator().manual_seed(5)) * 2


def parameters(made) -> list[torch.Tensor]:
    return [p.detach().clone() for p in made.adapted.parameters()]


def test_trusting_all_is_tent() -> None:
    ours, tent = method(entropy_margin=math.inf, reweight=False), method(Tent)
    for x in batches():
        assert torch.allclose(ours(x), tent(x), atol=1e-6)
    for a, b in zip(parameters(ours), parameters(tent), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_gradient_is_that_of_the_chosen_samples_alone() -> None:
    made = method(entropy_margin=0.98)
    x = batches(1)[0]
    made.reset()
    logits = made.adapted(x)
    h = entropy(logits)
    limit = 0.98 * math.log(3)
    keep = h < limit
    assert 0 < keep.sum() < len(x)
    loss = ((limit - h.detach()).exp() * h)[keep].mean()
    wanted = torch.autograd.grad(loss, list(made.now.named.values()))
    before = {name: p.detach().clone() for name, p in made.now.named.items()}
    made(x)
    for (name, p), g in zip(made.now.named.items(), wanted, strict=True):
        assert torch.allclose(p, before[name] - 0.5 * g, atol=1e-6)


def test_what_resembles_the_average_is_redundant() -> None:
    made = method(entropy_margin=10.0, redundancy_margin=0.9)
    made.reset()
    sure = torch.tensor([[9.0, 0, 0], [9.0, 0, 0]])
    assert made.chosen(sure).tolist() == [1, 1], "nothing was seen before"
    first = made.average.clone()
    assert torch.allclose(first, sure.softmax(1)[0])
    other = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])
    assert made.chosen(other).tolist() == [0, 1]
    assert torch.allclose(made.average, 0.9 * first + 0.1 * other[1].softmax(0)), "it follows the chosen"
    after = made.average
    assert made.chosen(sure).tolist() == [0, 0]
    assert torch.equal(made.average, after)


def test_the_average_is_in_32_bits() -> None:
    logits, averages = torch.randn(40, 3), []
    for dtype in (torch.float32, torch.bfloat16):
        made = method(entropy_margin=10.0, redundancy_margin=0.9)
        made.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            for part in logits.split(10):
                made.chosen(part)
        averages.append(made.average)
    assert torch.allclose(*averages, atol=1e-6)


def test_no_step_without_a_chosen_sample() -> None:
    made = method(entropy_margin=1e-6)
    made.reset()
    before = parameters(made)
    for x in batches():
        made(x)
    assert all(torch.equal(a, b) for a, b in zip(parameters(made), before, strict=True))


def test_fisher_information_holds_parameters_back() -> None:
    moved = []
    for weight in (0.0, 0.5, 1e3):
        made = method(entropy_margin=2.0, fisher_weight=weight)
        made.adaptation_optimizer_recipe = partial(torch.optim.SGD, lr=1e-4)
        made.held_out = lambda: iter(batches(2))
        made.reset()
        made.begin(iter(()))
        start = parameters(made)
        for x in batches(6):
            made(x)
        moved.append(sum((a - b).square().sum() for a, b in zip(parameters(made), start, strict=True)))
    assert moved[0] > moved[1] > moved[2]


def test_fisher_information_is_the_mean_of_squared_batch_gradients() -> None:
    made = method(fisher_weight=1.0, fisher_samples=10)
    made.held_out = lambda: iter(batches(3))  # two batches of 8 are enough
    made.reset()
    made.begin(iter(()))
    squares = []
    for x in batches(3)[:2]:
        logits = made.adapted(x)
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
        squares.append([g.square() for g in torch.autograd.grad(loss, list(made.now.named.values()))])
    for (information, _), *parts in zip(made.anchors.values(), *squares, strict=True):
        assert torch.allclose(information, sum(parts) / 2, atol=1e-8)


def test_ranks_choose_together(on_ranks) -> None:
    """On a network whose samples do not see each other two ranks equal one, whichever has the reliable ones."""
    x = batches(1)[0]

    def run(part: torch.Tensor) -> list[torch.Tensor]:
        made = method()
        made.reset()
        for layer in made.adapted.modules():
            layer._forward_pre_hooks.clear()
        with torch.no_grad():
            h = entropy(made.adapted(x))
        made.entropy_margin = float(h.sort().values[3:5].mean()) / math.log(3)
        made(x[h.argsort()][part])
        return [p.detach() for p in made.adapted.parameters()] + [made.average]

    joint, first = torch.arange(8), torch.arange(5)  # four of eight are reliable, all on the first rank
    for ours, theirs, one in zip(*on_ranks(lambda r: run(joint[5:] if r else first)), run(joint), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.allclose(ours, one, atol=1e-5)


def test_ranks_measure_as_many_batches_whatever_their_sizes(on_ranks) -> None:
    """A rank that went on alone would wait for the others for ever."""
    x = torch.randn(27, 1, 12, 12)

    def run(rank: int) -> list[torch.Tensor]:
        made = method(fisher_weight=1.0, fisher_samples=14)
        made.held_out = lambda: iter([x[:7], x[7:14]] if rank == 0 else [x[14:20], x[20:27]])  # 13 samples, then 14
        made.reset()
        made.begin(iter(()))
        return [information for information, _ in made.anchors.values()]

    for ours, theirs in zip(*on_ranks(run), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "wrong",
    [{"entropy_margin": 0.0}, {"entropy_margin": math.inf}, {"redundancy_margin": 0.0}, {"fisher_weight": -1.0}],
)
def test_refusals(wrong) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        method(**wrong)
