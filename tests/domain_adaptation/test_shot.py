from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer
from torch import Tensor

from callbacks import DomainPictures, PseudoLabeler
from datamodules import Blobs, DomainData
from datamodules.sources.base import MissingData
from datamodules.sources.domain_files import DomainFolders
from zoo import SHOT, SourceOnly
from zoo.cli import main
from zoo.core.errors import UserError
from zoo.core.heads import WeightNorm
from zoo.core.necks import Bottleneck
from zoo.core.network import Network
from zoo.losses import centroid_labels, information_maximization

NETWORK = partial(
    Network, backbone="lenet", in_channels=1, head=WeightNorm, neck=partial(Bottleneck, width=16, relu=False)
)
SGD = partial(torch.optim.SGD, lr=0.01)


def method(cls: type = SHOT, classes: int = 3, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return cls(network=NETWORK, num_classes=classes, optimizer=SGD, **arguments)


def built(**arguments: Any) -> Any:
    made = method(**arguments)
    made.configure_model()
    return made


def batch(n: int = 6) -> dict:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (n,), generator=generator)
    weight = torch.ones(n)
    weight[0], weight[1] = 0, 0.5
    return {
        "target": {
            "image": torch.randn(n, 1, 28, 28, generator=generator),
            "pseudo_label": F.one_hot(labels, 3).float() * (weight > 0)[:, None],
            "pseudo_label_weight": weight,
        }
    }


def trainer(tmp_path, *callbacks: Any, **arguments: Any) -> Trainer:
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **{"max_epochs": 2, **arguments},
    )  # fmt: skip


class Readable(Blobs):
    """A source by another name."""


class Absent(Blobs):
    """A source that nobody may look at."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("the source was read")

    prepare = train = test = _refuse


def target(**arguments: Any) -> Blobs:
    return Blobs(num_classes=3, size=28, channels=1, samples=90, seed=3, **arguments)


def data(source: type = Absent) -> DomainData:
    own = source(num_classes=3, size=28, channels=1, samples=60)
    return DomainData(own, target(), batch_size=10, steps=3, val_size=0.1)


def test_is_its_equation() -> None:
    made, b = built(), batch()
    loss = made.training_step(b, 0)
    z = made.network(b["target"]["image"])
    labels, weights = b["target"]["pseudo_label"], b["target"]["pseudo_label_weight"]
    wanted = information_maximization(z, 1e-5) - 0.3 * (weights * (labels * z.log_softmax(1)).sum(1)).mean()
    assert torch.allclose(loss, wanted, atol=1e-5)


def test_arguments_reach_the_terms() -> None:
    b = batch()
    made = built(information_weight=2.0, pseudo_label_weight=0.0, epsilon=0.1, diversity=False)
    wanted = 2 * information_maximization(made.network(b["target"]["image"]), 0.1, 0.0)
    assert torch.allclose(made.training_step(b, 0), wanted, rtol=1e-4)
    outputs = {"features": torch.eye(3).repeat(2, 1)[:5], "probabilities": torch.eye(3).repeat(2, 1)[:5] * 0.9 + 0.03}
    assert built().pseudo_labels(outputs).argmax(1).tolist() == [0, 1, 2, 0, 1]
    assert built(min_count=1).pseudo_labels(outputs)[:, 2].sum() == 0  # a single sample is no class
    far = {**outputs, "features": outputs["features"] * torch.tensor([1.0, 1, 1, 9, 9])[:, None]}
    labels = [built(distance=name).pseudo_labels(far).argmax(1).tolist() for name in ("cosine", "euclidean")]
    assert labels[0] == [0, 1, 2, 0, 1] != labels[1]


def test_head_is_frozen_and_everything_else_learns() -> None:
    made = built()
    made.training_step(batch(), 0).backward()
    assert all(not p.requires_grad for p in made.network.head.parameters())
    learning = [*made.network.backbone.parameters(), *made.network.neck.parameters()]
    assert all(p.grad is not None for p in learning)
    given = [p for group in made.configure_optimizers().param_groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in learning}


def test_never_reads_the_source(tmp_path) -> None:
    """Neither when it learns and is validated nor when it is tested or predicts; labels are those of the target."""
    seen: list[dict] = []

    class Watch(SHOT):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    made, labeler = method(Watch), PseudoLabeler(filename=None)
    t = trainer(tmp_path, labeler)
    t.fit(made, datamodule=data())
    assert len(seen) == 6
    assert all(set(b) == {"target"} for b in seen)
    assert all(bool(b["target"]["has_pseudo_label"].all()) for b in seen)
    assert labeler.round == 3
    assert set(t.callback_metrics) >= {"oracle/accuracy"}
    assert not any(name.startswith("val") for name in t.callback_metrics)
    t.test(made, datamodule=data(), verbose=False)
    t.predict(made, datamodule=data())
    with pytest.raises(AssertionError, match="the source was read"):
        trainer(tmp_path).fit(method(SourceOnly), datamodule=data())


def test_a_source_of_folders_need_not_be_there(tmp_path) -> None:
    """Its classes must be known; where they are given, nobody looks for them on the disk."""
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "photo" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / "photo" / name / f"{number}.png")

    def folders(classes: tuple[str, ...] | None) -> DomainData:
        source, own = (DomainFolders(str(tmp_path), name, size=8, classes=classes) for name in ("sketch", "photo"))
        return DomainData(source, own, batch_size=4, steps=1, val_size=0)

    network = partial(Network, backbone="tiny_cnn")
    trainer(tmp_path, PseudoLabeler(filename=None), max_epochs=1).fit(
        SHOT(network=network, num_classes=2), datamodule=folders(("cat", "dog"))
    )
    with pytest.raises(MissingData, match=r"no folder of the domain 'sketch'\. Expected"):
        trainer(tmp_path).fit(SHOT(network=network, num_classes=2), datamodule=folders(None))
    with pytest.raises(UserError, match="'dog' is none of the classes given"):
        DomainFolders(str(tmp_path), "photo", classes=("cat", "cow")).train()


def test_the_same_data_serves_source_and_adaptation_and_holds_the_same_target_out(tmp_path) -> None:
    d = data(Blobs)
    trainer(tmp_path, max_steps=1).fit(method(SourceOnly), datamodule=d)
    both = d.split
    trainer(tmp_path, max_steps=1).fit(method(), datamodule=d)
    assert set(d.roles) == {"target"}
    assert set(d.split.parts) == {"target", "oracle"}
    assert torch.equal(d.split["target"], both["target"])
    again = data()
    again.split_path = str(both.save(tmp_path / "split.json"))
    trainer(tmp_path, max_steps=1).fit(method(), datamodule=again)
    assert torch.equal(again.split["oracle"], both["oracle"])
    other = DomainData(
        Absent(num_classes=3, size=28), Blobs(num_classes=3, samples=95, size=28), split=again.split_path
    )
    with pytest.raises(UserError, match="divides"):
        trainer(tmp_path, max_steps=1).fit(method(), datamodule=other)


def test_labels_are_those_of_the_centroids_of_the_whole_target(tmp_path) -> None:
    made, labeler, d = method(), PseudoLabeler(filename=None, every_n_epochs=0), data()
    trainer(tmp_path, labeler, max_steps=1, limit_val_batches=0).fit(made, datamodule=d)
    index, labels = labeler.index, labeler.probabilities
    fresh = method()
    fresh.configure_model()
    fresh.eval()
    rows = list(d.pseudo_label_dataloader())
    images = torch.cat([d.on_after_batch_transfer(dict(row), 0)["image"] for row in rows])
    with torch.no_grad():
        features = fresh.network.features(images)
        probabilities = fresh.network.logits(features).softmax(1)
    order = torch.cat([row["index"] for row in rows]).argsort()
    assert torch.equal(index, d.roles["target"].samples.ids.sort().values)
    assert torch.equal(labels.argmax(1), centroid_labels(features[order], probabilities[order]))
    assert torch.equal(labels.sum(1), torch.ones(len(labels)))


def test_warns_where_nobody_labels(tmp_path) -> None:
    with pytest.warns(UserWarning, match="without a PseudoLabeler"):
        trainer(tmp_path, max_steps=1).fit(method(), datamodule=data())


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_centroids_repair_labels(distance) -> None:
    """Two tight groups, one sample of the second wrongly predicted: the centroids know better."""
    features = torch.tensor([[5.0, 0.1], [5.0, 0.0], [5.0, -0.1], [0.1, 5.0], [0.0, 5.0], [-0.1, 5.0]])
    probabilities = torch.tensor([[0.9, 0.1]] * 3 + [[0.2, 0.8], [0.2, 0.8], [0.6, 0.4]])
    assert centroid_labels(features, probabilities, distance).tolist() == [0, 0, 0, 1, 1, 1]


def test_classes_that_nobody_predicts_have_no_centroid() -> None:
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    probabilities = torch.cat([features[:, :2].softmax(1) * 0.99, torch.full((20, 1), 0.01)], dim=1)
    assert set(centroid_labels(features, probabilities).tolist()) <= {0, 1}


def test_weight_norm_head_is_torchs() -> None:
    torch.manual_seed(0)
    head, theirs = WeightNorm(5, 3), torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 3))
    with torch.no_grad():
        head.length.mul_(torch.tensor([0.5, 1.0, 2.0]))
        theirs.bias.copy_(head.bias)
        theirs.parametrizations.weight.original0.copy_(head.length[:, None])
        theirs.parametrizations.weight.original1.copy_(3 * head.direction)  # the length of a direction means nothing
    x = torch.randn(4, 5)
    assert torch.allclose(head(x), theirs(x), atol=1e-6)


def test_source_training_with_smoothed_labels() -> None:
    made = method(SourceOnly, label_smoothing=0.1)
    made.configure_model()
    b = {"source": {"image": batch()["target"]["image"], "label": torch.tensor([0, 1, 2, 0, 1, 2])}}
    log_p = made.network(b["source"]["image"]).log_softmax(1)
    wanted = F.one_hot(b["source"]["label"], 3) * 0.9 + 0.1 / 3
    assert torch.allclose(made.training_step(b, 0), -(wanted * log_p).sum(1).mean(), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"distance": "cosinus"}, "cosine"),
        ({"information_weight": -1.0}, "information_weight"),
        ({"min_count": -1}, "min_count=-1"),
    ],
)
def test_refusals(arguments, match) -> None:
    with pytest.raises(UserError, match=match):
        method(**arguments)
    with pytest.raises(UserError, match="label_smoothing=1"):
        method(SourceOnly, label_smoothing=1.0)


def test_pictures_of_the_source_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="must not see the source"):
        trainer(tmp_path, DomainPictures()).fit(method(), datamodule=data())


def test_the_second_stage_of_the_pipeline_reads_no_source_image(tmp_path, monkeypatch) -> None:
    """As the command line runs it, with all that it adds to a run, from the first stage's checkpoint."""
    monkeypatch.chdir(Path(__file__).parents[2])
    root = Path("configs")
    stages = yaml.safe_load((root / "pipelines/shot_digits.yaml").read_text())["stages"]
    own = {"num_classes": 10, "size": 28, "channels": 1, "samples": 60, "test_samples": 20}
    names = [f"{__name__}.{kind.__name__}" for kind in (Readable, Absent)]
    weights = None
    for name, source in zip(("train_source", "train_adapted"), names, strict=True):
        config = yaml.safe_load(Path(stages[name]["config"][0]).read_text())
        config["data"]["init_args"] |= {
            "source": {"class_path": source, "init_args": own},
            "target": {"class_path": "Blobs", "init_args": {**own, "seed": 3}},
            **{"steps": 2, "batch_size": 8, "val_size": 10},
        }
        config["trainer"]["max_epochs"] = 1
        if weights:
            assert stages[name]["overrides"] == {"model.network.weights": "${train_source.checkpoint}"}
            config["model"]["init_args"]["network"]["init_args"]["weights"] = str(weights)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        folder = tmp_path / name
        fit = ["fit", "-c", str(file), f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"]
        main([*fit, "--trainer.devices=1", "--trainer.enable_progress_bar=false"])
        weights = folder / "checkpoints" / "last.ckpt"
        assert weights.is_file()
