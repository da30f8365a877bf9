from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from datamodules import Blobs
from datamodules.rounds import RoundsData, agreement
from datamodules.sources import Rotated
from zoo import RichFeatureDiscovery, RichFeatureSynthesis
from zoo.core.errors import UserError
from zoo.core.heads import Cosine
from zoo.core.network import Network

NETWORK = partial(Network, backbone="tiny_mlp", in_channels=2, arguments={"width": 16, "side": 1})
ADAM = partial(torch.optim.Adam, lr=0.01)


def cues(samples: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (N, 2, 4, 4) with a cue in each channel, labels, and the cues: right in 95% and in 80% of the samples."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (samples,), generator=generator)
    flips = torch.rand(2, samples, generator=generator) < torch.tensor([[0.05], [0.2]])
    both = labels ^ flips.long()
    images = (2.0 * both.T - 1).view(samples, 2, 1, 1).expand(samples, 2, 4, 4)
    return images + 0.3 * torch.randn(samples, 2, 4, 4, generator=generator), labels, both[0], both[1]


def method(cls: type, network=NETWORK, classes: int = 2, **arguments):
    torch.manual_seed(0)
    made = cls(network=network, num_classes=classes, optimizer=ADAM, **arguments)
    made.configure_model()
    return made


def train(made, steps: int, images, labels, rounds=None, rows=None):
    """Batches of 256 of the rows."""
    optimizer, generator = made.configure_optimizers(), torch.Generator().manual_seed(1)
    rows = torch.arange(len(images)) if rows is None else rows
    for _ in range(steps):
        chosen = rows[torch.randint(len(rows), (256,), generator=generator)]
        source = {"image": images[chosen], "label": labels[chosen]}
        if rounds is not None:
            source["rounds"] = rounds[chosen]
        optimizer.zero_grad()
        made.training_step({"source": source}, 0).backward()
        optimizer.step()
        made.on_train_batch_end(None, None, 0)
    return made


@torch.no_grad()
def predictions(made, images) -> torch.Tensor:
    return made.network(images).argmax(dim=1)


def test_rounds_find_one_cue_after_the_other_and_the_synthesis_has_both() -> None:
    images, labels, strong, weak = cues()
    first = predictions(train(method(RichFeatureDiscovery), 60, images, labels), images)
    assert (first == strong).float().mean() > 0.98

    second_round = train(method(RichFeatureDiscovery), 120, images, labels, first.unsqueeze(1))
    second = predictions(second_round, images)
    assert (second == weak).float().mean() > 0.95
    assert (second == strong).float().mean() < 0.85  # 0.77 by the labels alone
    wrong = first != labels
    assert (second == labels)[wrong].float().mean() > 0.5  # where the first is always wrong

    rounds = torch.stack([first, second], dim=1)
    agree = agreement(rounds, labels)
    rows = torch.cat([agree.nonzero().flatten()[:500], (~agree).nonzero().flatten()[:500]])
    synthesis = train(method(RichFeatureSynthesis), 120, images, labels, rounds, rows)
    with torch.no_grad():
        features = synthesis.network.features(images)
        logits = [head(features) for head in synthesis.heads]
        for r, z in enumerate(logits):
            assert (z.argmax(dim=1) == rounds[:, r]).float().mean() > 0.95
        assert torch.allclose(synthesis.network(images), (logits[0] + logits[1]) / 2, atol=1e-5)


def test_without_rounds_it_is_the_mean_and_with_rounds_the_worst_group() -> None:
    images, labels, strong, weak = (t[:64] for t in cues())
    made = method(RichFeatureDiscovery)
    source = {"image": images, "label": labels}
    losses = F.cross_entropy(made.network(images), labels, reduction="none")
    assert torch.allclose(made.training_step({"source": source}, 0), losses.mean())
    rounds = torch.stack([strong, weak], dim=1)
    groups = [losses[cue == labels].mean() for cue in (strong, weak)]
    groups += [losses[cue != labels].mean() for cue in (strong, weak)]
    loss = made.training_step({"source": {**source, "rounds": rounds}}, 0)
    assert torch.allclose(loss, max(groups))


def test_groups_are_those_of_all_ranks(on_ranks) -> None:
    images, labels, strong, weak = (t[:40] for t in cues())
    order = (weak == labels).long().argsort()  # all of the worst group are on the first rank
    source = {"image": images, "label": labels, "rounds": torch.stack([strong, weak], dim=1)}

    def run(rows: slice) -> list[torch.Tensor]:
        made = method(RichFeatureDiscovery)
        made.training_step({"source": {k: v[order][rows] for k, v in source.items()}}, 0).backward()
        return [p.grad for p in made.parameters()]

    for ours, theirs, joint in zip(*on_ranks(lambda r: run(slice(20 * r, 20 * r + 20))), run(slice(40)), strict=True):
        assert torch.allclose((ours + theirs) / 2, joint, atol=1e-6)


def test_synthesis_is_the_mean_over_the_heads_and_reads_no_label() -> None:
    images, _, strong, weak = (t[:32] for t in cues())
    made = method(RichFeatureSynthesis)
    rounds = torch.stack([strong, weak], dim=1)
    source = {"image": images, "rounds": rounds}
    made.network.dropout = nn.Tanh()  # stands for what is random
    features = made.network.features(images).tanh()
    losses = [F.cross_entropy(head(features), rounds[:, r]) for r, head in enumerate(made.heads)]
    loss, wanted = made.training_step({"source": source}, 0), (losses[0] + losses[1]) / 2
    assert torch.allclose(loss, wanted)
    learning = [*made.network.backbone.parameters(), *made.heads.parameters()]
    for ours, theirs in zip(torch.autograd.grad(loss, learning), torch.autograd.grad(wanted, learning), strict=True):
        assert theirs.abs().sum() > 0
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_own_head_is_the_mean_in_every_checkpoint_and_learns_nothing_itself() -> None:
    made = method(RichFeatureSynthesis, rounds=3, classes=5)
    with torch.no_grad():
        for number, head in enumerate(made.heads):
            head.weight.fill_(number)
            head.bias.fill_(2.0 * number)
    state = made.state_dict()
    assert (state["network.head.weight"] == 1.0).all()
    assert (state["network.head.bias"] == 2.0).all()
    assert not any(p.requires_grad for p in made.network.head.parameters())
    assert made.network.head.weight.data_ptr() not in {head.weight.data_ptr() for head in made.heads}


def test_weights_of_the_synthesis_begin_another_training(tmp_path) -> None:
    made = method(RichFeatureSynthesis, network=partial(NETWORK, backbone="tiny_mlp"))
    path = tmp_path / "synthesis.ckpt"
    torch.save({"state_dict": made.state_dict(), "hyper_parameters": {}}, path)
    network = NETWORK(2, weights=str(path))
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(network.eval()(x), made.network.eval()(x))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: method(RichFeatureSynthesis, rounds=0), "rounds=0"),
        (lambda: method(RichFeatureSynthesis, network=partial(NETWORK, head=Cosine)), "Cosine"),
        (lambda: method(RichFeatureSynthesis).training_step(images_only(), 0), "data.rounds"),
        (lambda: method(RichFeatureSynthesis, rounds=3).training_step(images_only(rounds=2), 0), "the data has 2"),
        (lambda: data(sampling="agree"), "agreement"),
        (lambda: data(["a"], "agreement", sources=1, batch_size=7), "batch_size=7 must be even"),
    ],
)
def test_what_does_not_fit_is_said(make, named) -> None:
    with pytest.raises(UserError, match=named):
        make()


def images_only(**more) -> dict:
    images, labels, *_ = (t[:4] for t in cues(8))
    rounds = {"rounds": torch.zeros(4, more["rounds"], dtype=torch.long)} if more else {}
    return {"source": {"image": images, "label": labels, **rounds}}


# The data


def data(rounds=(), sampling="domains", sources: int = 2, batch_size: int = 8) -> RoundsData:
    def source(degrees: int, part: int) -> Rotated:
        blobs = Blobs(num_classes=3, size=8, channels=1, samples=90, test_samples=12)
        return Rotated(blobs, degrees, part=(part, 3))

    domains = [source(0, 0), source(90, 1)][:sources]
    return RoundsData(domains, source(180, 2), list(rounds), sampling, batch_size=batch_size, steps=6, val_size=0.2)


def written(path: Path, index: torch.Tensor, classes: torch.Tensor) -> str:
    save_file({"index": index, "probabilities": F.one_hot(classes, 3).float()}, path, {"samples": "train"})
    return str(path)


def training_samples() -> SimpleNamespace:
    made = data()
    made.prepare_data()
    samples = made.prediction_set()
    return SimpleNamespace(index=samples.ids, labels=samples.labels)


def test_predictions_are_of_the_training_samples_each_with_a_number_of_its_own() -> None:
    made = data()
    made.prepare_data()
    made.setup("fit")
    predicted = torch.cat([batch["index"] for batch in made.predict_dataloader()])
    assert made.predicts == "train"
    assert len(predicted.unique()) == len(predicted) == len(made.roles["source"].samples)
    assert torch.equal(predicted, made.roles["source"].samples.ids)


def test_batches_carry_what_every_round_said_of_these_samples(tmp_path) -> None:
    known = training_samples()
    first = torch.where(torch.arange(len(known.labels)) % 3 == 0, (known.labels + 1) % 3, known.labels)
    second = torch.where(torch.arange(len(known.labels)) % 2 == 0, (known.labels + 2) % 3, known.labels)
    shuffled = torch.randperm(len(known.index), generator=torch.Generator().manual_seed(0))
    files = [written(tmp_path / "a.safetensors", known.index[shuffled], first[shuffled])]
    files += [written(tmp_path / "b.safetensors", known.index, second)]
    where = {int(i): row for row, i in enumerate(known.index)}
    for sampling in ("domains", "agreement"):
        made = data(files, sampling)
        made.prepare_data()
        made.setup("fit")
        shares = []
        for batch, _, _ in made.train_dataloader():
            source = batch["source"]
            rows = torch.tensor([where[int(i)] for i in source["index"]])
            assert torch.equal(source["rounds"], torch.stack([first, second], dim=1)[rows])
            assert torch.equal(source["label"], known.labels[rows])
            shares.append(agreement(source["rounds"], source["label"]).float().mean().item())
        assert (set(shares) == {0.5}) == (sampling == "agreement")


@pytest.mark.parametrize(
    ("move", "sampling", "named"),
    [(0, "domains", "rightly"), (1, "domains", "wrongly"), (None, "agreement", "needs rounds")],
)
def test_a_round_that_leaves_a_group_empty_is_named(tmp_path, move, sampling, named) -> None:
    known = training_samples()
    rounds = [] if move is None else [written(tmp_path / "a.safetensors", known.index, (known.labels + move) % 3)]
    made = data(rounds, sampling)
    made.prepare_data()
    with pytest.raises(UserError, match=named):
        made.setup("fit")


def test_rounds_that_never_differ_are_named(tmp_path) -> None:
    known = training_samples()
    classes = torch.where(torch.arange(len(known.labels)) % 3 == 0, (known.labels + 1) % 3, known.labels)
    same = written(tmp_path / "a.safetensors", known.index, classes)
    made = data([same, same], "agreement")
    made.prepare_data()
    made.setup("fit")
    with pytest.raises(UserError, match="nothing new"):
        made.train_dataloader()


def test_a_file_that_is_not_there_is_named() -> None:
    made = data(["nowhere.safetensors"])
    made.prepare_data()
    with pytest.raises(UserError, match="nowhere"):
        made.setup("fit")


def test_agreement_by_hand() -> None:
    rounds = torch.tensor([[1, 1], [0, 0], [1, 0], [2, 0]])
    assert agreement(rounds, torch.tensor([1, 1, 1, 1])).tolist() == [True, True, False, True]
