import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from zoo import SimMatch
from zoo.core.errors import UserError
from zoo.policies import Alignment

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "simmatch.json").read_text())


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


def data(ids: Tensor) -> Any:
    labeled = SimpleNamespace(samples=SimpleNamespace(ids=ids, labels=torch.arange(len(ids)) % 4))
    return SimpleNamespace(roles={"labeled": labeled})


IDS = torch.tensor([30, 7, 12])


def simmatch(ids: Tensor | None = IDS, **arguments) -> SimMatch:
    arguments = {
        "projection": Rest,
        "projection_dim": 6,
        "alignment": lambda _: Alignment(),
        "threshold": 0.6,
    } | arguments
    made = SimMatch(network=Halves, num_classes=4, **arguments)
    made.configure_model()
    if ids is not None:
        made.prepare_for(data(ids))
    return made


def batch(index: Tensor = IDS, size: int = 6) -> dict[str, dict[str, Tensor]]:
    labeled = {"image": torch.randn(len(index), 10), "label": index % 4, "index": index}
    return {"labeled": labeled, "unlabeled": {"weak": 3 * torch.randn(size, 10), "strong": torch.randn(size, 10)}}


def terms(made: SimMatch, b: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    report = made.report
    made.report = lambda **values: kept.update(values) or report(**values)  # type: ignore[method-assign]
    made.training_step(b, 0)
    return kept


def golden_batch() -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    given = {name: torch.tensor(value) for name, value in GOLDEN["inputs"].items()}
    labeled = {
        "image": torch.cat([torch.zeros(3, 4), given["labeled"]], dim=1),
        "label": given["labels"],
        "index": 10 * given["index"],
    }
    unlabeled = {
        "weak": torch.cat([given["weak_logits"], given["weak"]], dim=1),
        "strong": torch.cat([given["weak_logits"], given["strong"]], dim=1),
    }
    return {"labeled": labeled, "unlabeled": unlabeled}, given


@pytest.mark.parametrize("labeler", ["student", "teacher"])
def test_a_step_of_the_released_code(labeler) -> None:
    b, given = golden_batch()
    made = simmatch(10 * torch.arange(7), labeler=labeler, bank_momentum=0.0, threshold=0.7, instance_weight=5.0)
    made.bank.put(
        torch.arange(7), normalize(given["bank"]), label=given["bank_labels"], index=made.bank.column("index")
    )
    got, wanted = terms(made, b), GOLDEN["outputs"]
    targets = torch.tensor(wanted["targets"])
    fitted = cross_entropy(given["weak_logits"], targets, reduction="none")
    assert got["instance"].item() == pytest.approx(5 * sum(wanted["instance"]) / 5, rel=1e-5)
    torch.testing.assert_close(got["unlabeled"], (fitted * (targets.amax(1) >= 0.7)).mean())
    torch.testing.assert_close(made.bank.features, torch.tensor(wanted["bank"]))
    assert made.bank.column("label").tolist() == wanted["bank_labels"]


def test_before_the_memory_is_full_it_is_fixmatch_with_soft_labels() -> None:
    made, b = simmatch(), batch(IDS[:2])
    weak, strong = b["unlabeled"]["weak"], b["unlabeled"]["strong"]
    p = weak[:, :4].softmax(1)
    sure = p.amax(1) >= 0.6
    assert 0 < sure.sum() < 6
    for _ in range(2):
        got = terms(made, b)
        assert got["instance"] == 0
        torch.testing.assert_close(got["unlabeled"], (sure * cross_entropy(strong[:, :4], p, reduction="none")).mean())
    made.training_step(batch(IDS[2:]), 0)  # the last slot
    assert terms(made, b)["instance"] > 0


def test_slots_follow_the_sample_numbers_and_average_their_embeddings() -> None:
    made = simmatch(bank_momentum=0.5)
    assert made.bank.column("index").tolist() == [7, 12, 30]
    first, second = batch(), batch(IDS.flip(0))
    made.training_step(first, 0)
    own = normalize(first["labeled"]["image"][:, -6:])
    torch.testing.assert_close(made.bank.features, own[[1, 2, 0]])  # an empty slot takes the embedding as it is
    assert made.bank.column("label").tolist() == [3, 0, 2]
    made.training_step(second, 0)
    new = normalize(second["labeled"]["image"][:, -6:])
    torch.testing.assert_close(made.bank.features, normalize((own[[1, 2, 0]] + new[[1, 0, 2]]) / 2))
    torch.testing.assert_close(made.bank.features.norm(dim=1), torch.ones(3))  # every sample's, not every column's


def test_a_queue_needs_no_data_module() -> None:
    made = simmatch(ids=None, bank_size=4)
    b = batch()
    made.training_step(b, 0)
    own = normalize(b["labeled"]["image"][:, -6:])
    torch.testing.assert_close(made.bank.features[:3], own)
    made.training_step(b, 0)
    torch.testing.assert_close(made.bank.features, own[[1, 2, 2, 0]])
    assert terms(made, b)["instance"] > 0


def test_gradients_reach_the_strong_view_only() -> None:
    made, b = simmatch(), batch()
    made.training_step(b, 0)
    for view in b["unlabeled"].values():
        view.requires_grad_()
    b["labeled"]["image"].requires_grad_()
    got = terms(made, b)
    inputs = [b["unlabeled"]["weak"], b["unlabeled"]["strong"], b["labeled"]["image"]]
    weak, strong, labeled = torch.autograd.grad(got["instance"], inputs, allow_unused=True)
    assert strong.any()
    assert all(x is None or not x.any() for x in (weak, labeled))
    assert torch.autograd.grad(got["unlabeled"], made.projection.move, allow_unused=True) == (None,)  # only in targets


def test_the_teacher_is_the_average_of_network_and_projection() -> None:
    made, b = simmatch(labeler="teacher"), batch()
    (first, network), (second, projection) = made.teacher_pairs
    assert (first, network, second, projection) == (
        made.teacher,
        made.network,
        made.projection_teacher,
        made.projection,
    )
    made.training_step(b, 0)
    before = terms(made, b)["instance"]
    made.network.scale.data.fill_(9.0)  # the student alone has moved
    torch.testing.assert_close(terms(made, b)["instance"], before)
    made.projection_teacher.module.move.data.fill_(3.0)
    assert not torch.allclose(terms(made, b)["instance"], before)


def test_a_checkpoint_brings_its_slots() -> None:
    made = simmatch()
    made.training_step(batch(), 0)
    other = simmatch(ids=None)
    other.load_state_dict(made.state_dict())
    other.prepare_for(data(IDS))  # what was restored stays
    b = batch()
    assert torch.equal(made.training_step(b, 0), other.training_step(b, 0))
    assert other.bank.full
    other.prepare_for(data(torch.tensor([1, 2])))  # other data: other slots
    assert other.bank.size == 2
    assert not other.bank.filled.any()


def test_two_ranks_hold_one_memory_and_learn_what_one_process_would(on_ranks) -> None:
    batches = [batch(torch.tensor([30, 7, 12, 7])) for _ in range(3)]

    def work(rank: int, ranks: int = 2) -> list[Tensor]:
        made, loss = simmatch(), torch.zeros(())
        for b in batches:
            share = {r: {k: v.chunk(ranks)[rank] for k, v in d.items()} for r, d in b.items()}
            loss = loss + made.training_step(share, 0)
        return [
            *torch.autograd.grad(loss, [made.network.scale, made.projection.move]),
            *made.bank.state_dict().values(),
        ]

    wanted, results = work(0, 1), on_ranks(work)
    for got in results:
        for ours, theirs in zip(got[2:], wanted[2:], strict=True):
            torch.testing.assert_close(ours, theirs)
    for first, second, one in zip(results[0][:2], results[1][:2], wanted[:2], strict=True):
        torch.testing.assert_close((first + second) / 2, one)


@pytest.mark.parametrize(
    "arguments", [{"threshold": 1.5}, {"smoothing": -0.1}, {"temperature": 0.0}, {"bank_size": 0}, {"labeler": "me"}]
)
def test_mistakes(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        simmatch(**arguments)


def test_without_labeled_samples_it_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="set bank_size"):
        simmatch(ids=None).training_step(batch(), 0)
