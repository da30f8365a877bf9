from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import OpenSetEvaluation, RunSummary, SupervisedBaseline
from callbacks.open_set import SCORES, open_set_metrics
from datamodules import Blobs, SupervisedData
from datamodules.sources import KnownClasses
from zoo import Network, Supervised
from zoo.core.errors import UserError


def brute_force(known, unknown, right) -> dict[str, float]:
    pairs = [(float(s > u) + 0.5 * float(s == u), bool(r)) for s, r in zip(known, right, strict=True) for u in unknown]
    thresholds = sorted({*known.tolist(), *unknown.tolist()}, reverse=True)
    accepted = [t for t in thresholds if (known >= t).double().mean() >= 0.95]
    precision = recall = area = 0.0
    for t in thresholds:
        tp, fp = int((known >= t).sum()), int((unknown >= t).sum())
        precision, before, recall = tp / (tp + fp), recall, tp / len(known)
        area += precision * (recall - before)
    return {
        "auroc": sum(value for value, _ in pairs) / len(pairs),
        "oscr": sum(value for value, r in pairs if r) / len(pairs),
        "fpr95": min(float((unknown >= t).double().mean()) for t in accepted),
        "aupr": area,
    }


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_equal_loops_over_pairs_and_thresholds(ties) -> None:
    known, unknown, right = 30 + 40 * torch.randn(60), 40 * torch.randn(45), torch.rand(60) < 0.7
    if ties:
        known, unknown = (known / 20).round(), (unknown / 20).round()
    found = open_set_metrics(known, unknown, right)
    assert found == pytest.approx(brute_force(known.double(), unknown.double(), right), abs=1e-6)


def test_metrics_by_hand() -> None:
    known, unknown = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 0.0])
    right = torch.tensor([True, False, True])
    found = open_set_metrics(known, unknown, right)
    # pairs won: 3 beats both, 2 ties and wins, 1 loses and wins
    assert found["auroc"] == pytest.approx((2 + 1.5 + 1) / 6)
    assert found["oscr"] == pytest.approx((2 + 1) / 6)
    assert found["fpr95"] == 0.5  # all known ones pass at 1, and so does the 2


def test_limits() -> None:
    apart, right = torch.rand(20) + 1, torch.rand(20) < 0.5
    found = open_set_metrics(apart, apart - 2, right)
    assert found["auroc"] == found["aupr"] == 1
    assert found["fpr95"] == 0
    assert found["oscr"] == pytest.approx(float(right.float().mean()))
    every = open_set_metrics(torch.randn(20), torch.randn(20), torch.ones(20).bool())
    assert every["oscr"] == pytest.approx(every["auroc"])
    one = open_set_metrics(torch.zeros(4), torch.zeros(4), torch.ones(4).bool())  # a score that says nothing
    assert (one["auroc"], one["oscr"], one["aupr"], one["fpr95"]) == (0.5, 0.5, 0.5, 1.0)
    # large logits differ although a sigmoid of them would not
    assert open_set_metrics(torch.tensor([60.0, 70.0]), torch.tensor([50.0]), torch.ones(2).bool())["auroc"] == 1
    for pair in ((torch.zeros(0), apart), (apart, torch.zeros(0))):
        with pytest.raises(UserError, match="samples of both kinds"):
            open_set_metrics(*pair, torch.ones(len(pair[0])).bool())


def test_scores_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0], [3.0, 5.0]])
    assert SCORES["max_logit"](logits).tolist() == [3, 5]
    assert SCORES["max_softmax"](logits).tolist() == pytest.approx([0.880797, 0.880797])  # blind to the size
    assert SCORES["energy"](logits).tolist() == pytest.approx([3.126928, 5.126928])


def data(**arguments):
    return SupervisedData(
        KnownClasses(Blobs(num_classes=5, size=8, samples=100, test_samples=50), known=[3, 0, 1]),
        **{"batch_size": 12, "steps": 6, "val_size": 12, "eval_batch_size": 7, **arguments},
    )


def model():
    from functools import partial

    torch.manual_seed(0)
    network = partial(Network, backbone="tiny_cnn", in_channels=1)
    return Supervised(network=network, num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.05))


def by_hand(module, d, score="max_logit") -> dict[str, float]:
    known, unknown = d.source.test(), d.source.unknown()

    def scores(samples):
        batch = d.on_after_batch_transfer(samples[list(range(len(samples)))], 0)
        with torch.no_grad():
            return module.eval()(batch["image"]), batch["label"]

    (logits, label), (others, nobody) = scores(known), scores(unknown)
    assert nobody.eq(-1).all()
    return open_set_metrics(SCORES[score](logits), SCORES[score](others), logits.argmax(1) == label)


def test_a_test_of_a_run(trainer, tmp_path) -> None:
    callback, module, d = OpenSetEvaluation(scores=["max_logit", "max_softmax", "energy"]), model(), data()
    run = trainer(callback)
    run.fit(module, d)
    found = run.test(module, d, verbose=False)[0]
    for score in SCORES:
        mine = {k.removeprefix(f"open_set/{score}/"): v for k, v in found.items() if f"open_set/{score}/" in k}
        assert mine == pytest.approx(by_hand(module, d, score), abs=1e-6)
    assert found["open_set/max_logit/oscr"] <= found["test/accuracy"] + 1e-6
    assert not module._forward_hooks


def test_unknown_samples_of_another_source(trainer) -> None:
    other = Blobs(num_classes=2, size=8, test_samples=20, seed=5)
    module, d = model(), data()
    callback = OpenSetEvaluation(unknown=other)
    found = trainer(callback).test(module, d, verbose=False)[0]
    batch = d.on_after_batch_transfer(other.test()[list(range(20))], 0)
    known = d.on_after_batch_transfer((t := d.source.test())[list(range(len(t)))], 0)
    with torch.no_grad():
        z, u = module.eval()(known["image"]), module(batch["image"])
    expected = open_set_metrics(z.amax(1), u.amax(1), z.argmax(1) == known["label"])
    assert found["open_set/max_logit/auroc"] == pytest.approx(expected["auroc"], abs=1e-6)
    with pytest.raises(UserError, match=r"OpenSet.* of size 16, but the network was trained on 1 of size 8"):
        trainer(OpenSetEvaluation(unknown=Blobs(size=16))).test(module, d, verbose=False)


def test_two_processes_equal_one(trainer, tmp_path, two_ranks) -> None:
    class Save(Callback):
        def on_test_end(self, trainer, pl_module) -> None:
            found = {k: float(v) for k, v in trainer.callback_metrics.items()}
            torch.save(found, tmp_path / f"{trainer.world_size}-{trainer.global_rank}.pt")

    for more in ({}, two_ranks):
        trainer(OpenSetEvaluation(scores=["energy"]), Save(), **more).test(model(), data(), verbose=False)
    one, *both = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert [k for k in one if k.startswith("open_set/energy/")]
    assert both[0] == both[1] == pytest.approx(one, abs=1e-6)


def test_after_a_fit_of_the_best_and_of_the_baseline(trainer, tmp_path) -> None:
    import json

    saver = ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="val/accuracy", mode="max")
    module = model()
    module.baseline = model
    callbacks = [OpenSetEvaluation(), SupervisedBaseline(max_steps=1), RunSummary(True, picture=False, table=False)]
    trainer(*callbacks, saver, enable_checkpointing=True).fit(module, data())
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    for prefix in ("", "best/", "baseline/"):
        assert f"{prefix}open_set/max_logit/auroc" in metrics
    assert metrics["open_set/max_logit/auroc"] == pytest.approx(by_hand(module, data())["auroc"], abs=1e-6)


def test_repeated_and_unlabelled_samples_do_not_count() -> None:
    callback, logged = OpenSetEvaluation(), {}
    callback._rows = [(torch.tensor([0, 1, 1, 2]), torch.tensor([[1.0, 3.0], [0.0, 2.0], [0.0, 2.0], [-1.0, 9.0]]))]
    callback._score_unknown = lambda *_: [(torch.tensor([0, 1]), torch.tensor([[-1.0, 2.0], [-1.0, 0.0]]))]
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    callback.on_test_epoch_end(trainer, SimpleNamespace(log_dict=lambda values, **_: logged.update(values)))
    expected = open_set_metrics(torch.tensor([3.0, 2.0]), torch.tensor([2.0, 0.0]), torch.tensor([True, False]))
    assert logged == {f"open_set/max_logit/{name}": value for name, value in expected.items()}


def test_errors(trainer, points, method) -> None:
    with pytest.raises(UserError, match=r"unknown score 'max_logits'.* Did you mean 'max_logit'"):
        OpenSetEvaluation(scores=["max_logits"])
    with pytest.raises(UserError, match="must name one of"):
        OpenSetEvaluation(scores=[])
    with pytest.raises(UserError, match="there are no unknown samples"):
        trainer(OpenSetEvaluation()).fit(method(), points())
