import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo import T3A
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.t3a import Supports
from zoo.losses import entropy

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "t3a.json").read_text())


class Features(nn.Module):
    """Features are the inputs."""

    def __init__(self, weight, bias) -> None:
        super().__init__()
        weight, bias = torch.as_tensor(weight), torch.as_tensor(bias)
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.load_state_dict({"weight": weight, "bias": bias})
        self.logits = self.head.forward

    def features(self, x):
        return x


def method(weight, bias, **arguments):
    made = T3A(network=lambda classes: Features(weight, bias), num_classes=len(bias), **arguments)
    made.configure_model()
    made._adapts = True
    return made


@pytest.mark.parametrize("supports", [1, 3, 1000, None])
def test_figures_of_the_authors(supports) -> None:
    given = GOLDEN["inputs"]
    made = method(given["weight"], given["bias"], supports=supports)
    for x, wanted in zip(given["batches"], GOLDEN["outputs"][str(supports or 1000)], strict=True):
        torch.testing.assert_close(made(torch.tensor(x)), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def loop(weight, bias, batches, supports):
    """The paper's algorithm, sample by sample."""
    kept = [[] for _ in bias]

    def remember(features, logits) -> None:
        for z, row in zip(features, logits, strict=True):
            kept[int(row.argmax())].append((entropy(row[None]).item(), z / z.norm()))
        for rows in kept:
            rows.sort(key=lambda pair: pair[0])
            rows[:] = rows[:supports]

    remember(weight, weight @ weight.T + bias)
    for z in batches:
        remember(z, z @ weight.T + bias)
        centres = [torch.stack([s for _, s in rows]).sum(0) if rows else torch.zeros_like(z[0]) for rows in kept]
        yield z @ F.normalize(torch.stack(centres), dim=1).T


@pytest.mark.parametrize("supports", [1, 2, 7, None])
def test_like_a_loop_over_samples(supports) -> None:
    weight, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    batches = torch.randn(4, 6, 5).double() + 0.5
    made = method(weight.float(), bias.float(), supports=supports).double()
    made.network.head.load_state_dict({"weight": weight, "bias": bias})
    for z, wanted in zip(batches, loop(weight, bias, batches, supports), strict=True):
        assert torch.allclose(made(z), wanted, atol=1e-10)


def test_keeping_all_is_the_nearest_mean_of_pseudo_labels() -> None:
    weight, bias = torch.randn(3, 5), torch.zeros(3)
    z = torch.randn(40, 5)
    made = method(weight, bias)
    ours = made(z).argmax(1)
    rows = F.normalize(torch.cat([weight, z]), dim=1)
    labels = (torch.cat([weight, z]) @ weight.T).argmax(1)
    means = torch.stack([rows[labels == c].mean(0) for c in range(3)])
    assert torch.equal(ours, F.cosine_similarity(z[:, None], means[None], dim=2).argmax(1))


def test_a_class_without_supports_is_zero_and_the_memory_has_one_size() -> None:
    memory = Supports(4, 2)
    logits = torch.tensor([[9.0, 0, 0, 0], [8.0, 0, 0, 0], [7.0, 0, 0, 0], [0, 0, 5.0, 0]])
    features = torch.eye(4)
    memory.add(features, logits)
    expected = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert torch.allclose(memory.sums, expected), "the third sample was the least certain of its class"
    assert memory.features.shape == (8, 4)
    memory.add(torch.full((1, 4), torch.nan), torch.full((1, 4), torch.nan))
    assert torch.allclose(memory.sums, expected), "rows that fill up count nothing"


@pytest.mark.parametrize("size", [None, 300])
def test_supports_are_summed_and_compared_in_32_bits(size) -> None:
    """Under autocast too: a sum of hundreds of unit vectors does not notice the next one in 16 bits."""
    plain, mixed = Supports(3, size), Supports(3, size)
    for z in torch.randn(20, 40, 5) + 1:
        plain.add(z, z[:, :3])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed.add(z, z[:, :3])
    assert torch.equal(mixed.sums, plain.sums)
    made, z = method(torch.randn(3, 5), torch.randn(3), supports=size), torch.randn(40, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = made(z)
    assert torch.equal(logits, z @ made.memory.directions().T)


def test_ranks_share_their_supports(on_ranks) -> None:
    weight, bias, z = torch.randn(3, 5), torch.randn(3), torch.randn(7, 5)
    ours, theirs = on_ranks(lambda rank: method(weight, bias, supports=2)(z[:4] if rank == 0 else z[4:]))
    assert torch.allclose(torch.cat([ours, theirs]), method(weight, bias, supports=2)(z), atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(UserError, match="supports=0"):
        method(torch.randn(3, 5), torch.randn(3), supports=0)
    from zoo.core.heads import MLP

    made = T3A(network=partial(Network, backbone="lenet", in_channels=1, head=MLP), num_classes=3)
    made.configure_model()
    with pytest.raises(UserError, match=r"linear.*MLP"):
        made.reset()
