import json
from functools import partial
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import DomainPictures, RunSummary
from callbacks.domain_pictures import CLASSES, OTHERS, draw_domains, project
from datamodules import Blobs, DomainData, SupervisedData
from zoo import Network, SourceOnly, Tent
from zoo.core.checkpoint_io import RunCheckpoint
from zoo.core.errors import UserError


def blobs(seed: int = 0) -> Blobs:
    return Blobs(num_classes=3, size=8, channels=1, samples=90, test_samples=90, seed=seed)


def data(source=None, target=None) -> DomainData:
    return DomainData(source or blobs(), target or blobs(1), batch_size=8, steps=2, val_size=20, eval_batch_size=30)


def method(kind=SourceOnly, **arguments):
    torch.manual_seed(0)
    network = partial(Network, backbone="tiny_cnn", in_channels=1)
    return kind(network=network, num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.1), **arguments)


def trainer(folder, *callbacks, **arguments) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 2,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
            "callbacks": list(callbacks), **arguments,
        }
    )  # fmt: skip


def colours(path) -> set[tuple[int, ...]]:
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()}


def rgb(code: str) -> tuple[int, ...]:
    return tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))


def test_a_test_leaves_a_picture_and_the_distance(tmp_path) -> None:
    pictures = DomainPictures(max_samples=60)
    found = trainer(tmp_path, pictures).test(method(), data(), verbose=False)[0]
    report = pictures.domain_reports["last"]
    assert found["domain/a_distance"] == pytest.approx(report["a_distance"])
    assert 0 <= report["a_distance"] <= 2
    assert list(report["accuracy"]) == ["source", "target"]
    assert sum(report["accuracy"]["target"]) / 3 == pytest.approx(found["test/accuracy"], abs=1e-5)  # 30 of each class
    seen = colours(tmp_path / "domains.png")
    assert len(seen) > 200
    assert {rgb("#0072B2"), rgb("#D55E00")} <= seen  # the bars


def test_domains_that_are_equal_and_that_are_not(tmp_path) -> None:
    class Bright(Blobs):
        def test(self):
            samples = super().test()
            samples.images = samples.images // 4 + 190
            return samples

    def distance(target) -> float:
        pictures = DomainPictures(picture=False)
        trainer(tmp_path, pictures).test(method(), data(target=target), verbose=False)
        return pictures.domain_reports["last"]["a_distance"]

    assert distance(blobs()) < 0.3
    assert distance(Bright(num_classes=3, size=8, channels=1, samples=90, test_samples=90)) == 2
    assert not list(tmp_path.glob("*.png"))


def test_two_ranks_measure_what_one_measures(tmp_path) -> None:
    def run(folder, **arguments):
        kept = {}

        class Keep(Callback):
            def on_test_end(self, trainer, pl_module) -> None:
                kept.update(pictures.domain_reports["last"])
                if trainer.world_size > 1:
                    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(kept))

        pictures = DomainPictures(max_samples=45)
        found = trainer(folder, pictures, Keep(), **arguments).test(method(), data(), verbose=False)
        return found[0]["domain/a_distance"], kept

    one, report = run(tmp_path)
    two, _ = run(tmp_path, strategy="ddp_fork", devices=2)
    assert two == pytest.approx(one, abs=1e-6)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == report


def test_what_adapts_while_it_is_tested_shows_before_and_after(tmp_path) -> None:
    pictures = DomainPictures(max_samples=60)
    model = method(Tent)
    found = trainer(tmp_path, pictures).test(model, data(), verbose=False)[0]
    accuracy = pictures.domain_reports["last"]["accuracy"]
    assert list(accuracy) == ["source", "target, before", "target, adapted"]
    assert sum(accuracy["target, before"]) / 3 == pytest.approx(found["unadapted/accuracy"], abs=1e-5)
    assert sum(accuracy["target, adapted"]) / 3 == pytest.approx(found["test/accuracy"], abs=1e-5)
    assert not model._forward_hooks


def test_last_and_selected_weights_have_pictures_and_the_file_has_both(tmp_path) -> None:
    class Script(Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            pl_module.log("val/score", 1.0 - trainer.current_epoch)

    taken = []

    class Board(TensorBoardLogger):
        """Writes nothing."""

        log_dir = root_dir = save_dir = str(tmp_path)

        def __init__(self) -> None:
            pass

        @property
        def experiment(self):
            return self

        def add_image(self, tag, pixels, step, dataformats) -> None:
            taken.append(tag)

        def log_metrics(self, *_, **__) -> None: ...
        def log_hyperparams(self, *_, **__) -> None: ...
        def log_graph(self, *_, **__) -> None: ...
        def save(self) -> None: ...
        def finalize(self, status) -> None: ...

    pictures = DomainPictures(max_samples=30)
    saver = RunCheckpoint(str(tmp_path / "checkpoints"), monitor="val/score")
    summary = RunSummary(test_after_fit=True, table=False)
    run = trainer(tmp_path, Script(), summary, saver, pictures, enable_checkpointing=True, logger=Board())
    run.fit(method(), data())
    assert (tmp_path / "domains.png").is_file()
    assert (tmp_path / "domains_selected.png").is_file()
    assert taken == ["domains", "domains_selected", "summary"]
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert list(found["domains"]) == ["last", "selected"]
    assert found["domains"]["last"]["a_distance"] == pytest.approx(found["metrics"]["domain/a_distance"])
    assert found["domains"]["selected"]["a_distance"] == pytest.approx(found["metrics"]["best/domain/a_distance"])


def test_several_sources_and_many_classes_can_be_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    domains = {
        name: (torch.randn(80, 6, generator=generator) + shift, torch.randint(40, (80,), generator=generator))
        for shift, name in enumerate(["one", "two", "three"])
    }
    names = [f"class {label}" for label in range(40)]
    figure = draw_domains(domains, {}, names, "title", 0.5)
    first, second, bars = figure.axes
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["one (80)", "two (80)", "three (80)"]
    assert second.get_title() == "the same by class, the 10 most frequent"
    assert len(second.texts) == len(CLASSES)
    drawn = {tuple((255 * c[:3]).round().astype(int)) for part in second.collections for c in part.get_facecolors()}
    assert drawn == {rgb(code) for code in (*CLASSES, OTHERS)}
    assert [text.get_text() for text in bars.texts] == ["no class predictions were evaluated"]
    assert "A-distance 0.50" in figure.get_suptitle()
    assert first.get_xlabel().startswith("first component, ")


def test_projections() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 3, 1, 1, 1])
    points, names = project(x, "pca")
    gram = (x - x.mean(0)) @ torch.linalg.svd((x - x.mean(0)).double()).Vh[:2].float().T
    assert torch.allclose(points.abs().float(), gram.abs(), atol=1e-4)
    assert points.var(dim=0)[0] > points.var(dim=0)[1]
    assert names[0].endswith("of variance")
    points, names = project(x, "tsne")
    assert points.shape == (40, 2)
    assert torch.equal(points, project(x, "tsne")[0])


def test_what_is_not_possible_is_said() -> None:
    with pytest.raises(UserError, match="Did you mean 'tsne'"):
        DomainPictures("t-sne")
    with pytest.raises(UserError, match="max_samples=3 must be at least 4"):
        DomainPictures(max_samples=3)
    with pytest.raises(UserError, match="SupervisedData has no source and target domain"):
        DomainPictures().setup(SimpleNamespace(datamodule=SupervisedData(blobs())), None, "test")
