import math
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo import FixMatch, Method, Network, Supervised
from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.schedules import CosineLR
from zoo.policies import MovingAlignment, Threshold

NETWORK = partial(Network, backbone="tiny_mlp", in_channels=1)


def loader(batches: int = 6) -> DataLoader:
    generator = torch.Generator().manual_seed(0)

    def views() -> Tensor:
        return torch.randn(4, 1, 8, 8, generator=generator)

    items = [
        {
            "labeled": {"image": views(), "label": torch.randint(3, (4,), generator=generator)},
            "unlabeled": {"weak": views(), "strong": views()},
        }
        for _ in range(batches)
    ]
    return DataLoader(items, batch_size=None)


def evaluation() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    image, label = torch.randn(10, 1, 8, 8, generator=generator), torch.arange(10) % 3
    return DataLoader([{"image": image, "label": label, "index": torch.arange(10)}], batch_size=None)


def trainer(tmp_path, **arguments) -> Trainer:
    arguments = {"max_steps": 4, "max_epochs": -1, "logger": False, "enable_checkpointing": False, **arguments}
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **arguments
    )


def fixmatch(**arguments) -> FixMatch:
    policy = partial(Threshold, threshold=0.4, alignment=MovingAlignment)
    return FixMatch(network=NETWORK, num_classes=3, policy=policy, **arguments)


def test_built_once_and_not_before() -> None:
    method = Supervised(network=NETWORK, num_classes=3)
    assert not list(method.parameters())
    method.configure_model()
    network = method.network
    method.configure_model()
    assert method.network is network


def test_a_module_is_not_a_recipe() -> None:
    with pytest.raises(UserError, match="network must be a recipe"):
        Supervised(network=nn.Linear(1, 1), num_classes=3)


def test_report_sums_and_logs_only_at_the_loggers_steps(tmp_path) -> None:
    logged = []

    class Probe(Supervised):
        def log_dict(self, values, **arguments) -> None:
            logged.append((self.global_step, {k: float(v) for k, v in values.items()}))

        def training_step(self, batch, batch_idx) -> Tensor:
            return self.report(one=super().training_step(batch, batch_idx) * 0 + 1.0, two=torch.tensor(2.0))

    Probe.card = Supervised.card
    method = Probe(network=NETWORK, num_classes=3)
    trainer(tmp_path, log_every_n_steps=2).fit(method, loader())
    ours = [(step, values) for step, values in logged if "train/one" in values]
    assert [step for step, _ in ours] == [1, 3]
    assert ours[0][1] == {"train/loss": 3.0, "train/one": 1.0, "train/two": 2.0}


def test_scheduler_learns_the_length_and_multipliers_hold(tmp_path) -> None:
    optimizer = partial(torch.optim.SGD, lr=0.1, weight_decay=0.5)
    method = Supervised(
        network=NETWORK, num_classes=3, optimizer=optimizer, scheduler=CosineLR, lr_multipliers={"network.head": 10.0}
    )
    t = trainer(tmp_path, max_steps=4)
    rates = []

    class Watch(Supervised):
        pass

    method.on_train_batch_end = lambda *_: rates.append([g["lr"] for g in t.optimizers[0].param_groups])
    t.fit(method, loader())
    of_head = [i for i, g in enumerate(t.optimizers[0].param_groups) if g["lr_multiplier"] == 10.0]
    for step, row in enumerate(rates):
        expected = 0.1 * 0.5 * (1 + math.cos(math.pi * (step + 1) / 4))
        for i, rate in enumerate(row):
            assert rate == pytest.approx(expected * (10 if i in of_head else 1), abs=1e-9)
    assert {g["weight_decay"] for g in t.optimizers[0].param_groups} == {0.0, 0.5}


def test_progress(tmp_path) -> None:
    seen = []

    class Probe(Supervised):
        def training_step(self, batch, batch_idx) -> Tensor:
            seen.append(self.progress)
            return super().training_step(batch, batch_idx)

    method = Probe(network=NETWORK, num_classes=3)
    assert method.progress == 0.0
    trainer(tmp_path).fit(method, loader())
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_loaders_name_their_metrics_and_the_value_is_right(tmp_path) -> None:
    method = Supervised(network=NETWORK, num_classes=3)
    t = trainer(tmp_path)
    t.validate(method, {"val": evaluation(), "oracle": evaluation()}, verbose=False)
    batch = next(iter(evaluation()))
    expected = (method.eval()(batch["image"]).argmax(1) == batch["label"]).float().mean()
    assert set(t.callback_metrics) == {"val/accuracy", "oracle/accuracy"}
    assert t.callback_metrics["oracle/accuracy"] == expected
    t.test(method, evaluation(), verbose=False)
    assert t.callback_metrics["test/accuracy"] == expected


def test_predicts_probabilities_with_indices(tmp_path) -> None:
    (prediction,) = trainer(tmp_path).predict(Supervised(network=NETWORK, num_classes=3), evaluation())
    assert prediction["index"].tolist() == list(range(10))
    torch.testing.assert_close(prediction["probabilities"].sum(1), torch.ones(10))


def test_classes_of_data_and_module_must_agree(tmp_path) -> None:
    from lightning.pytorch import LightningDataModule

    class Four(LightningDataModule):
        num_classes = 4

        def train_dataloader(self) -> DataLoader:
            return loader()

    with pytest.raises(UserError, match="built for 3 classes, but Four has 4"):
        trainer(tmp_path).fit(Supervised(network=NETWORK, num_classes=3), datamodule=Four())


@pytest.mark.parametrize("through", [FixMatch, Method, LightningModule])
def test_a_module_built_in_python_reloads_safely_through_any_of_its_classes(tmp_path, through) -> None:
    method, t = fixmatch(unlabeled_weight=0.7, scheduler=CosineLR), trainer(tmp_path)
    t.fit(method, loader())
    t.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    loaded = through.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert type(loaded) is FixMatch
    assert (loaded.unlabeled_weight, loaded.policy.threshold, loaded.num_classes) == (0.7, 0.4, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(method.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(method.eval()(x), loaded.eval()(x))


def test_what_has_no_description_is_given_again(tmp_path) -> None:
    def make(num_outputs: int) -> Network:
        return Network(num_outputs, backbone="tiny_mlp", in_channels=1)

    method, t = Supervised(network=lambda n: make(n), num_classes=3), trainer(tmp_path)
    t.fit(method, loader())
    t.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert method.unrecorded == ("network",)
    with pytest.raises(UserError, match="give network again"):
        Supervised.load_from_checkpoint(tmp_path / "a.ckpt")
    assert Supervised.load_from_checkpoint(tmp_path / "a.ckpt", network=lambda n: make(n)).built


def test_another_class_is_refused(tmp_path) -> None:
    t = trainer(tmp_path)
    t.fit(Supervised(network=NETWORK, num_classes=3), loader())
    t.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(TypeError, match="holds a Supervised, which is not a FixMatch"):
        FixMatch.load_from_checkpoint(tmp_path / "a.ckpt")


def test_reloading_never_fetches_weights_again(tmp_path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "w.safetensors"
    save_file(NETWORK(3).state_dict(), file)
    method, t = Supervised(network=partial(NETWORK, weights=str(file)), num_classes=3), trainer(tmp_path)
    t.fit(method, loader())
    t.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    file.unlink()
    assert Supervised.load_from_checkpoint(tmp_path / "a.ckpt").config["init_args"]["network"]["init_args"][
        "weights"
    ] is None  # fmt: skip


def test_a_subclass_in_the_users_own_file_is_recorded_by_its_own_name() -> None:
    class Mine(FixMatch):
        card = Card(title="Mine", year=2026, paper="", family="semi_supervised", roles=("labeled", "unlabeled"))

        def __init__(self, margin: float = 0.5, **kwargs) -> None:
            super().__init__(**kwargs)
            self.margin = margin

    mine = Mine(margin=0.1, network=NETWORK, num_classes=3, momentum=0.9)
    assert mine.constructor == {
        "margin": 0.1,
        "network": {"class_path": "zoo.Network", "init_args": {"backbone": "tiny_mlp", "in_channels": 1}},
        "num_classes": 3,
        "momentum": 0.9,
    }
