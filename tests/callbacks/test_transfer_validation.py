import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from callbacks import RunSummary, TransferValidation
from callbacks.transfer_validation import VALIDATORS
from datamodules import Blobs, DomainData, GeneralizationData
from zoo import DANN, SHOT, Network
from zoo.core.checkpoint_io import RunCheckpoint
from zoo.core.errors import UserError
from zoo.core.validators import deep_embedded_validation, density_ratio, soft_neighborhood_density
from zoo.domain_adaptation.discriminators import DomainDiscriminator

ALL = [f"validator/{name}" for name in VALIDATORS]


def blobs(seed: int, **arguments) -> Blobs:
    return Blobs(
        **{"num_classes": 3, "size": 8, "channels": 1, "samples": 120, "test_samples": 30, **arguments}, seed=seed
    )


def data(**arguments) -> DomainData:
    return DomainData(
        **{"source": blobs(0), "target": blobs(1), "batch_size": 8, "steps": 3, "val_size": 30, **arguments}
    )


def method(**arguments) -> DANN:
    torch.manual_seed(0)
    network = partial(Network, backbone="tiny_cnn", in_channels=1, dropout=0.3)
    return DANN(
        network=network, num_classes=3, discriminator=partial(DomainDiscriminator, hidden=8, layers=1), **arguments
    )


def trainer(*callbacks, **arguments) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 2,
            "enable_progress_bar": False, "enable_model_summary": False, "callbacks": list(callbacks), **arguments,
        }
    )  # fmt: skip


class Values(Callback):
    """What every validation of a training said."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        metrics = trainer.callback_metrics
        self.seen.append({name: float(value) for name, value in metrics.items() if name.startswith("validator/")})


def test_values_are_those_of_the_target_by_the_evaluated_network() -> None:
    model, module, values = method(), data(), Values()
    run = trainer(TransferValidation(VALIDATORS, max_samples=50), values)
    run.fit(model, module)
    assert len(values.seen) == 2
    assert values.seen[0] != values.seen[1]
    model.eval()

    def images(samples):
        return module._as_floats(samples[range(len(samples))]["image"])

    with torch.no_grad():
        samples = module.roles["target"].samples
        x = images(samples)
        p, features = model(x).double().softmax(1), model.network.features(x)
        entropy = -float(torch.special.entr(p).sum(1).mean())
        some = torch.arange(50) * len(p) // 50
        source, held = module.roles["source"].samples, module.evaluation_sets("val")["val"]
        train = model.network.features(images(source))[torch.arange(50) * len(source) // 50]
        weights = density_ratio(train, features[some], model.network.features(images(held)))
        wrong = (model(images(held)).argmax(1) != held.labels).double()
    wanted = {
        "information_maximization": float(torch.special.entr(p.mean(0)).sum()) + entropy,
        "entropy": entropy,
        "batch_nuclear_norm": float(torch.linalg.matrix_norm(p, "nuc")) / math.sqrt(len(p) * 3),
        "soft_neighborhood_density": float(soft_neighborhood_density(p[some])),
        "deep_embedded_validation": -float(deep_embedded_validation(weights, wrong)),
    }
    for name, value in wanted.items():
        assert values.seen[1][f"validator/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("count", [40, 80])
def test_every_target_sample_is_predicted_once(count) -> None:
    model, seen = method(), []
    module = data(source=blobs(0), target=blobs(1, samples=count), val_size=0)
    run = trainer(TransferValidation(), max_epochs=1)
    model.configure_model()
    model.network.register_forward_hook(lambda network, inputs, _: seen.append((network.training, len(inputs[0]))))
    run.fit(model, module)
    assert sum(number for training, number in seen if not training) == count == len(module.roles["target"].samples)


class Look(Callback):
    """Random numbers and modes of every step."""

    def __init__(self) -> None:
        self.drawn = []

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.drawn.append((torch.rand(()).item(), pl_module.network.training))


@pytest.mark.parametrize("holds_out", [True, False])
def test_training_is_not_disturbed(holds_out, monkeypatch) -> None:
    if not holds_out:  # then it validates all the same, where the module is in training mode
        monkeypatch.setattr(DomainData, "val_dataloader", lambda self: [])

    class Drawing(TransferValidation):
        """As workers do when they start."""

        def measure(self, trainer, pl_module):
            torch.rand(3)
            return super().measure(trainer, pl_module)

    looks, models = [Look(), Look()], [method(), method()]
    for look, model, extra in zip(looks, models, ([], [Drawing()]), strict=True):
        torch.manual_seed(3)
        run = trainer(look, *extra, num_sanity_val_steps=0)
        run.fit(model, data())
        assert ("validator/entropy" in run.callback_metrics) == bool(extra)
    assert looks[0].drawn == looks[1].drawn
    assert all(mode for _, mode in looks[1].drawn)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_hidden_labels_change_no_validator(monkeypatch) -> None:
    def run():
        values = Values()
        trainer(TransferValidation(VALIDATORS), values).fit(method(), data())
        return values.seen

    clean, original = run(), Blobs.train

    def poisoned(self):
        samples = original(self)
        if self.seed == 1:  # the target: the labels that nobody may see
            samples.labels = (samples.labels + 1 + torch.arange(len(samples.labels)) % 2) % 3
        return samples

    monkeypatch.setattr(Blobs, "train", poisoned)
    assert run() == clean
    assert set(clean[0]) == set(ALL)


def test_two_ranks_say_what_one_says() -> None:
    def run(**arguments):
        model = method(optimizer=partial(torch.optim.SGD, lr=0.0))  # equal weights; BatchNorm is not trained on
        return trainer(TransferValidation(VALIDATORS, max_samples=40), **arguments).validate(
            model, data(), verbose=False
        )

    one, two = run(), run(strategy="ddp_fork", devices=2)
    for name in ALL:
        assert two[0][name] == pytest.approx(one[0][name], abs=1e-5), name


def test_resumes_exactly(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")

    class Keep(Values):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    whole, model = Keep(), method()
    trainer(TransferValidation(), whole).fit(model, data())
    resumed, again = Values(), method()
    trainer(TransferValidation(), resumed).fit(again, data(), ckpt_path=tmp_path / "one.ckpt")
    assert resumed.seen == whole.seen[1:]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_checkpoints_are_chosen_by_it_and_the_summary_says_so(tmp_path, capsys) -> None:
    class Script(TransferValidation):
        def measure(self, trainer, pl_module):
            values = super().measure(trainer, pl_module)
            values["information_maximization"] = torch.tensor([0.2, 0.9, 0.5][trainer.current_epoch])
            return values

    saver = RunCheckpoint(str(tmp_path / "checkpoints"))
    summary = RunSummary(test_after_fit=True, picture=False)
    run = trainer(Script(), summary, saver, max_epochs=3, enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(method(), data())
    assert saver.monitor == "validator/information_maximization"
    found = summary._best_checkpoint
    assert (found["monitor"], found["step"], found["oracle"]) == (saver.monitor, 6, False)
    shown = capsys.readouterr().out
    assert "selected         epoch 2, by validator/information_maximization" in shown
    assert summary.beside[saver.monitor]["validator/information_maximization"] == pytest.approx(0.9)


def test_what_is_not_possible_is_said_before_the_training() -> None:
    with pytest.raises(UserError, match="Did you mean 'entropy'"):
        TransferValidation(["entrophy"])
    with pytest.raises(UserError, match=r"validators=\[\] must name one of information_maximization"):
        TransferValidation([])
    with pytest.raises(UserError, match="max_samples=1 must be at least 2"):
        TransferValidation(max_samples=1)
    unseen = GeneralizationData([blobs(0), blobs(2)], blobs(1), 8)
    with pytest.raises(UserError, match=r"GeneralizationData shows no unlabelled target.*chosen by val/accuracy"):
        TransferValidation().setup(SimpleNamespace(datamodule=unseen), None, "fit")
    with pytest.raises(UserError, match="needs held-out source samples: val_size above 0"):
        TransferValidation(VALIDATORS).setup(SimpleNamespace(datamodule=data(val_size=0)), None, "fit")
    network = partial(Network, backbone="tiny_cnn", in_channels=1)
    with pytest.raises(UserError, match="needs source samples, which SHOT must not see"):
        trainer(TransferValidation(VALIDATORS)).fit(SHOT(network=network, num_classes=3), data())
