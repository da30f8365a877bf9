import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from zoo import CoMatch
from zoo.core.errors import UserError
from zoo.losses.graph import graph_contrastive_loss, pseudo_label_graph
from zoo.policies import Alignment
from zoo.policies.alignment import QueueAlignment

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "comatch.json").read_text())


class Halves(nn.Module):
    """The first C columns of an input are its logits, the others what is embedded."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs, self.num_features = num_outputs, 8
        self.scale = nn.Parameter(torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * features[:, : self.num_outputs]

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


class Rest(nn.Module):
    """The projection: the columns behind the logits, moved."""

    def __init__(self, in_features: int, num_outputs: int) -> None:
        super().__init__()
        self.move = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, features: Tensor) -> Tensor:
        return features[:, -len(self.move) :] + self.move


def comatch(**arguments) -> CoMatch:
    arguments = {
        "projection": Rest,
        "projection_dim": 5,
        "alignment": lambda _: Alignment(),
        "threshold": 0.6,
    } | arguments
    made = CoMatch(network=Halves, num_classes=4, **{"bank_size": 16, **arguments})
    made.configure_model()
    return made


def batch(size: int = 6) -> dict[str, dict[str, Tensor]]:
    views = {name: torch.randn(size, 9) for name in ("weak", "strong", "strong_2")}
    views["weak"] = 3 * views["weak"]
    return {"labeled": {"image": torch.randn(3, 9), "label": torch.arange(3)}, "unlabeled": views}


def terms(made: CoMatch, b: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    report = made.report
    made.report = lambda **values: kept.update(values) or report(**values)  # type: ignore[method-assign]
    made.training_step(b, 0)
    return kept


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_the_first_loss_by_hand(forward_pass) -> None:
    b = batch()
    weak, strong, strong_2 = b["unlabeled"].values()
    p = weak[:, :4].softmax(1)
    sure = p.amax(1) >= 0.6
    assert 0 < sure.sum() < 6
    fitted = cross_entropy(strong[:, :4], p, reduction="none")
    graph = pseudo_label_graph(p, 0.3)
    assert (graph > 0).sum() > 6
    made = comatch(graph_threshold=0.3, unlabeled_weight=0.5, contrastive_weight=0.25, forward_pass=forward_pass)
    got = terms(made, b)
    torch.testing.assert_close(got["supervised"], cross_entropy(b["labeled"]["image"][:, :4], torch.arange(3)))
    torch.testing.assert_close(got["unlabeled"], 0.5 * fitted[sure].sum() / 6)
    contrastive = graph_contrastive_loss(normalize(strong[:, -5:]), normalize(strong_2[:, -5:]), graph, 0.2)
    torch.testing.assert_close(got["contrastive"], 0.25 * contrastive)


@pytest.mark.parametrize("full", [True, False])
def test_a_step_of_the_released_code(full) -> None:
    given = {name: torch.tensor(value) for name, value in GOLDEN["inputs"].items()}
    wanted = GOLDEN["outputs"]["smoothed" if full else "first"]
    made = comatch(threshold=0.85, graph_threshold=0.6, bank_size=16, alignment=QueueAlignment, projection_dim=5)
    made.bank.update(normalize(given["queue"]), probabilities=given["queue_logits"].softmax(1))
    if not full:
        made.bank.filled = torch.arange(16) < 15
    unlabeled = {
        "weak": torch.cat([given["weak_logits"], given["weak"]], dim=1),
        "strong": torch.cat([given["strong_logits"], given["strong"]], dim=1),
        "strong_2": torch.cat([torch.zeros(8, 4), given["strong_2"]], dim=1),
    }
    labeled = {"image": torch.cat([torch.zeros(2, 4), given["labeled"]], dim=1), "label": given["labels"]}
    seen = []
    made.watched = seen
    got = terms(made, {"labeled": labeled, "unlabeled": unlabeled})
    assert seen[0][1].tolist() == wanted["mask"]
    assert got["unlabeled"].item() == pytest.approx(wanted["unlabeled"], rel=1e-5)
    assert got["contrastive"].item() == pytest.approx(wanted["contrastive"], abs=1e-5)
    bank = GOLDEN["outputs"]["bank"]  # the rows that the step wrote: what is aligned, not what is smoothed
    torch.testing.assert_close(made.bank.features[:10], torch.tensor(bank["features"]))
    torch.testing.assert_close(made.bank.column("probabilities")[:10], torch.tensor(bank["probabilities"]))


def test_smoothing_of_one_makes_no_use_of_the_memory() -> None:
    made, other = comatch(smoothing=1.0), comatch(smoothing=1.0)
    other.bank.update(torch.randn(16, 5), probabilities=torch.randn(16, 4).softmax(1))
    b = batch()
    assert torch.equal(made.training_step(b, 0), other.training_step(b, 0))
    smoothed = comatch(smoothing=0.5)
    smoothed.bank.load_state_dict(other.bank.state_dict())
    assert not torch.equal(made.training_step(b, 0), smoothed.training_step(b, 0))


def test_only_strong_views_learn_from_unlabeled_samples() -> None:
    b = batch()
    for view in b["unlabeled"].values():
        view.requires_grad_()
    made = comatch(smoothing=0.5, threshold=0.3)
    made.bank.update(torch.randn(16, 5), probabilities=torch.randn(16, 4).softmax(1))
    got = terms(made, b)
    views = list(b["unlabeled"].values())
    weak, strong, strong_2 = torch.autograd.grad(got["contrastive"], views, allow_unused=True, retain_graph=True)
    assert weak is None or not weak.any()
    assert strong[:, -5:].any()
    assert strong_2[:, -5:].any()
    inputs = [*views, made.projection.move]
    weak, strong, strong_2, projection = torch.autograd.grad(got["unlabeled"], inputs, allow_unused=True)
    assert projection is None  # only in targets
    assert strong[:, :4].any()
    assert all(x is None or not x.any() for x in (weak, strong_2))


def test_the_order_of_unlabeled_samples_does_not_matter() -> None:
    b, order = batch(), torch.randperm(6)
    permuted = {**b, "unlabeled": {name: view[order] for name, view in b["unlabeled"].items()}}
    torch.testing.assert_close(comatch().training_step(b, 0), comatch().training_step(permuted, 0))


def test_two_ranks_hold_one_memory_and_learn_what_one_process_would(on_ranks) -> None:
    batches = [batch(), batch(), batch()]
    for b in batches:
        b["labeled"] = {"image": torch.randn(2, 9), "label": torch.tensor([0, 3])}

    def work(rank: int, ranks: int = 2) -> list[Tensor]:
        made, loss = comatch(graph_threshold=0.3, bank_size=12, alignment=QueueAlignment), torch.zeros(())
        for b in batches:
            share = {r: {k: v.chunk(ranks)[rank] for k, v in d.items()} for r, d in b.items()}
            loss = loss + made.training_step(share, 0)
        gradients = torch.autograd.grad(loss, [made.network.scale, made.projection.move])
        return [*gradients, *made.bank.state_dict().values()]

    wanted = work(0, 1)
    results = on_ranks(work)
    for got in results:
        for ours, theirs in zip(got[2:], wanted[2:], strict=True):
            torch.testing.assert_close(ours, theirs)
    for first, second, one in zip(results[0][:2], results[1][:2], wanted[:2], strict=True):
        torch.testing.assert_close((first + second) / 2, one)


@pytest.mark.parametrize("arguments", [{"threshold": 1.5}, {"smoothing": -0.1}, {"temperature": 0.0}, {"bank_size": 0}])
def test_mistakes(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        comatch(**arguments)
