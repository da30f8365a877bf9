import json
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import EMATeacher, RunSummary, SupervisedBaseline
from zoo.core.errors import UserError


def fit(method, points, trainer, *callbacks, kind="averaged", **arguments):
    model = method(kind)
    trained = trainer(EMATeacher(), *callbacks, max_epochs=2, **arguments)
    trained.fit(model, points())
    return model, trained


def test_trains_and_tests_both(method, points, trainer, tmp_path, capsys) -> None:
    compared = SupervisedBaseline(max_steps=4)
    model, _ = fit(method, points, trainer, compared, RunSummary())
    assert compared.steps == 4
    assert set(compared.results) == {"method", "baseline"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics["test/accuracy"] == compared.results["method"]["test/accuracy"]
    assert metrics["baseline/test/accuracy"] == compared.results["baseline"]["test/accuracy"]
    assert "baseline, same labels, 4 steps" in " ".join(capsys.readouterr().out.split())
    # the number is that of an ordinary test of the same weights
    again = trainer().test(model, points(), verbose=False)
    assert again[0]["test/accuracy"] == pytest.approx(compared.results["method"]["test/accuracy"])


def test_the_baseline_is_an_ordinary_training(method, points, trainer, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    made = []
    model_class = type(method())
    original = model_class.baseline
    monkeypatch.setattr(model_class, "baseline", lambda self: made.append(original(self)) or made[-1])
    fit(method, points, trainer, SupervisedBaseline())
    plain = original(method())
    torch.manual_seed(3)
    trainer(max_epochs=2).fit(plain, points())  # as many steps as the run made
    assert torch.equal(plain.network.layer.weight, made[0].network.layer.weight)


def test_the_run_is_not_disturbed(method, points, trainer) -> None:
    class After(Callback):
        def on_fit_end(self, trainer, pl_module) -> None:
            self.seen = (torch.rand(4), pl_module.trainer is trainer, trainer.datamodule.trainer is trainer)

    one, two = After(), After()
    torch.manual_seed(5)
    model, _ = fit(method, points, trainer, one)
    torch.manual_seed(5)
    other, trained = fit(method, points, trainer, SupervisedBaseline(max_steps=3), two)
    assert torch.equal(one.seen[0], two.seen[0])
    assert one.seen[1:] == two.seen[1:] == (True, True)
    assert torch.equal(model.teacher.module.layer.weight, other.teacher.module.layer.weight)
    assert trained.global_step == 12


def test_on_the_real_data_module(trainer) -> None:
    from functools import partial

    from datamodules import SemiSupervisedData
    from datamodules.sources import Blobs
    from zoo import FixMatch, Network
    from zoo.policies import Threshold

    data = SemiSupervisedData(Blobs(), labels_per_class=4, batch_size=4, unlabeled_ratio=2, steps=3)
    network = partial(Network, backbone="lenet", in_channels=1)
    model = FixMatch(network=network, num_classes=3, policy=partial(Threshold, threshold=0.5))
    compared = SupervisedBaseline()
    trainer(EMATeacher(), compared).fit(model, data)
    assert compared.steps == 3
    assert set(compared.results["baseline"]) >= {"test/accuracy"}


def test_several_processes_leave_it_out(method, points, trainer, two_ranks, tmp_path) -> None:
    class Checked(SupervisedBaseline):
        def setup(self, trainer, pl_module, stage) -> None:
            with (
                pytest.warns(UserWarning, match="left out with 2 processes")
                if trainer.is_global_zero
                else nullcontext()
            ):
                super().setup(trainer, pl_module, stage)

        def teardown(self, trainer, pl_module, stage) -> None:
            (tmp_path / f"{trainer.global_rank}").write_text(str(self.results))

    fit(method, points, trainer, Checked(), **two_ranks)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["{}", "{}"]


def test_says_what_is_missing(method, points, trainer) -> None:
    model = method()
    model.baseline = None
    with pytest.raises(UserError, match=r"Plain has no baseline\(\)"):
        trainer(SupervisedBaseline()).fit(model, points())
    with pytest.raises(UserError, match="needs a data module"):
        trainer(SupervisedBaseline()).fit(method(), points().train_dataloader())
    with pytest.raises(ValueError, match="max_steps=0"):
        SupervisedBaseline(0)
