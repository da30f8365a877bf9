"""What every method that adapts when tested keeps, and Tent."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from callbacks import RunSummary
from zoo import EATA, ITTA, SAR, T3A, AdaptiveBatchNorm, SourceOnly, Tent
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.test_time import GradientAdaptation
from zoo.losses import entropy

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORK = partial(Network, backbone="tiny_cnn", in_channels=1, arguments={"width": 4})
SGD = partial(torch.optim.SGD, lr=0.1)
METHODS = {
    "tent": partial(Tent, adaptation_optimizer=SGD),
    "norm": AdaptiveBatchNorm,
    "norm online": partial(AdaptiveBatchNorm, mode="online", prior=4.0),
    "norm whole": partial(AdaptiveBatchNorm, whole_set=True),
    "t3a": T3A,
    "t3a small": partial(T3A, supports=2),
    "eata": partial(EATA, adaptation_optimizer=SGD, entropy_margin=2.0, redundancy_margin=1.0, fisher_weight=0.5),
    "sar": partial(SAR, adaptation_optimizer=SGD, entropy_margin=2.0, collapse=0.0),
    "itta": partial(ITTA, adaptation_optimizer=SGD, adaptation_weight=1.0, freeze_batch_norm=False),
}


def images(count: int, shift: float, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (count,), generator=generator)
    image = torch.randn(count, 1, 12, 12, generator=generator) + label.view(-1, 1, 1, 1) + shift
    return [{"image": image[i], "label": label[i], "index": torch.tensor(i)} for i in range(count)]


class Data(LightningDataModule):
    """One or more test sets; a held-out set of the source."""

    def __init__(self, **shifts: float) -> None:
        super().__init__()
        self.shifts = shifts or {"test": 2.0}

    def setup(self, stage: str) -> None: ...

    def loader(self, name: str) -> DataLoader:
        return DataLoader(images(21, self.shifts[name], seed=3), batch_size=8)

    def val_dataloader(self):
        return {"val": DataLoader(images(12, 0.0), batch_size=6)}

    def test_dataloader(self):
        return {name: self.loader(name) for name in self.shifts}

    def predict_dataloader(self):
        return self.loader(next(iter(self.shifts)))


def trainer(folder: Path, **arguments) -> Trainer:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **{**silent, **arguments})


def method(make=Tent, network=NETWORK, **arguments):
    torch.manual_seed(1)
    made = make(network=network, num_classes=3, **arguments)
    made.configure_model()
    for layer in made.modules():  # running averages that have seen something
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean, layer.running_var = (
                torch.randn(layer.num_features),
                torch.rand(layer.num_features) + 0.5,
            )
    return made.eval()


def figures(made, folder: Path, data=None, **arguments) -> dict[str, float]:
    t = trainer(folder, **arguments)
    t.test(made, datamodule=data or Data(), verbose=False)
    return {name: float(value) for name, value in t.callback_metrics.items()}


def adaptive(made, x, place: int = 0):
    """Logits of a batch as in a test, without a trainer."""
    made._adapts = True
    try:
        return made(x)
    finally:
        made._adapts = False


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_test_changes_nothing_that_was_trained_and_a_second_one_repeats_it(name, tmp_path) -> None:
    made = method(METHODS[name])
    before, structure = copy.deepcopy(made.state_dict()), [n for n, _ in made.named_modules()]
    kept: list[torch.Tensor] = []
    hook = made.register_forward_hook(lambda module, inputs, output: kept.append(output.detach().clone()))
    random = torch.get_rng_state()
    first = figures(made, tmp_path)
    logits, kept[:] = torch.cat(kept[1::2]), []
    torch.manual_seed(99)
    assert figures(made, tmp_path) == first
    assert torch.equal(torch.cat(kept[1::2]), logits)
    assert not torch.equal(torch.cat(kept[::2]), logits), "nothing was adapted"
    hook.remove()
    assert set(first) == {"test/accuracy", "unadapted/accuracy"}
    assert random.shape == torch.get_rng_state().shape
    assert list(made.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    assert [n for n, _ in made.named_modules()] == structure
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in made.modules())
    assert all(p.requires_grad and p.grad is None for p in made.network.parameters())
    assert made._now is None


@pytest.mark.parametrize("name", METHODS)
def test_predictions_are_those_of_the_test_and_validation_does_not_adapt(name, tmp_path) -> None:
    made = method(METHODS[name])
    kept: list[torch.Tensor] = []
    hook = made.register_forward_hook(lambda module, inputs, output: kept.append(output.detach().clone()))
    figures(made, tmp_path)
    tested = torch.cat(kept[1::2]).softmax(1)
    hook.remove()
    predicted = trainer(tmp_path).predict(made, datamodule=Data())
    assert torch.allclose(torch.cat([part["probabilities"] for part in predicted]), tested, atol=1e-6)
    assert torch.equal(torch.cat([part["index"] for part in predicted]), torch.arange(21))
    plain = method(SourceOnly)
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if k.startswith("network.")})
    validated = [trainer(tmp_path).validate(m, datamodule=Data(), verbose=False) for m in (made, plain)]
    assert validated[0] == validated[1]


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_test_sets_does_not_matter(name, tmp_path) -> None:
    shifts = {"near": 1.0, "far": -3.0}
    made = method(METHODS[name])
    together = figures(made, tmp_path, Data(**shifts))
    reversed_ = figures(made, tmp_path, Data(**dict(reversed(shifts.items()))))
    assert together == reversed_
    assert set(together) == {f"{a}{b}/accuracy" for a in ("", "unadapted_") for b in shifts}
    alone = figures(made, tmp_path, Data(far=-3.0))
    assert alone["far/accuracy"] == together["far/accuracy"]


@pytest.mark.parametrize("name", METHODS)
def test_runs_in_bfloat16(name, tmp_path) -> None:
    made = method(METHODS[name], **({"adaptation_steps": 2} if name in ("tent", "eata", "sar", "itta") else {}))
    assert all(0 <= value <= 1 for value in figures(made, tmp_path, precision="bf16-mixed").values())


@pytest.mark.parametrize("name", METHODS)
def test_unadapted_is_the_network_as_it_was(name, tmp_path) -> None:
    made = method(METHODS[name])
    plain = method(SourceOnly)
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if k.startswith("network.")})
    assert figures(made, tmp_path)["unadapted/accuracy"] == figures(plain, tmp_path)["test/accuracy"]


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_stay_together(name, on_ranks) -> None:
    def run(rank: int):
        made = method(METHODS[name])
        made.train(False)
        x = torch.stack([s["image"] for s in images(20, 2.0)])
        mine = [x[:11:2], x[1:10:2], x[10:][rank::2]]  # ranks have other samples, and once other numbers of them
        mine[0], mine[1] = (mine[0], mine[1]) if rank == 0 else (mine[1], mine[0])
        made.reset()
        if name == "eata":
            made.held_out = lambda: iter([x[rank : rank + 6]])
        if name == "norm whole":
            made._images = lambda stage, number: iter(mine)
        with torch.enable_grad():
            made.begin(iter(mine))
        for part in mine:
            torch.manual_seed(rank)
            adaptive(made, part)
        state = {**made.adapted.state_dict(), **{k: v.detach() for k, v in made.now.named.items()}}
        if name.startswith("t3a"):
            state["supports"] = made.memory.directions()
        return state

    ours, theirs = on_ranks(run)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


# --- the base class ---------------------------------------------------------------------------------------------------


def test_an_averages_network_is_what_adapts() -> None:
    from zoo.core.teachers import EMA

    made = method()
    made.teacher = EMA(made.network, 0.5)
    with torch.no_grad():
        made.teacher.module.head.bias.fill_(5.0)
    made.reset()
    assert torch.equal(made.adapted.head.bias, torch.full((3,), 5.0))
    assert not any(p is q for p in made.adapted.parameters() for q in made.parameters())


def test_episodic_begins_anew_with_every_batch() -> None:
    x = torch.randn(2, 8, 1, 12, 12) + 1
    online, episodic = (
        method(adaptation_optimizer=SGD, mode=mode, prediction="after") for mode in ("online", "episodic")
    )
    assert torch.equal(adaptive(online, x[0]), adaptive(episodic, x[0]))
    first = adaptive(episodic, x[0])
    adaptive(episodic, x[1])
    assert torch.equal(adaptive(episodic, x[0]), first)
    adaptive(online, x[1])
    assert not torch.equal(adaptive(online, x[0]), first)


def test_summary_counts_what_the_copy_says(tmp_path) -> None:
    summary = RunSummary(picture=False, table=False)
    made = method(METHODS["norm"])
    found = figures(made, tmp_path, callbacks=[summary])
    assert found["test/accuracy"] != found["unadapted/accuracy"]
    assert summary.counts.accuracy == pytest.approx(found["test/accuracy"])
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == pytest.approx(found)


def test_checkpoints_hold_no_copy(tmp_path) -> None:
    made = method()
    t = trainer(tmp_path)
    t.strategy.connect(made)
    made.trainer = t
    clean = t._checkpoint_connector.dump_checkpoint(weights_only=True)["state_dict"]
    adaptive(made, torch.randn(4, 1, 12, 12))
    assert made._now is not None
    dirty = t._checkpoint_connector.dump_checkpoint(weights_only=True)["state_dict"]
    assert list(clean) == list(dirty)


class Heads(GradientAdaptation):
    """Every parameter follows a squared error: also weights that autocast keeps 16-bit copies of."""

    def prepare_copy(self, network):
        return dict(network.named_parameters())

    def learn(self, x):
        logits = self.adapted(x)
        self.step(self.gradients(mse_loss(logits.float(), torch.zeros_like(logits).float())))
        return logits


def test_a_second_step_under_autocast_sees_the_first() -> None:
    made = method(Heads, adaptation_optimizer=SGD, adaptation_steps=2, prediction="after")
    x = torch.randn(8, 1, 12, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = adaptive(made, x)
        assert torch.equal(logits, made.adapted(x))
        torch.clear_autocast_cache()
        assert torch.equal(logits, made.adapted(x)), "stale"


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"mode='onlin'.*Did you mean 'online'"):
        method(mode="onlin")
    with pytest.raises(UserError, match="adaptation_steps=0"):
        method(adaptation_steps=0)
    with pytest.raises(UserError, match="prediction='first'"):
        method(prediction="first")
    with pytest.raises(UserError, match="no BatchNorm"):
        adaptive(method(network=partial(Network, backbone="lenet", in_channels=1)), torch.randn(4, 1, 28, 28))


# --- Tent -------------------------------------------------------------------------------------------------------------


def test_entropy_falls_on_the_same_batch_and_scales_and_shifts_alone_move() -> None:
    made = method(adaptation_optimizer=partial(torch.optim.SGD, lr=0.01), prediction="after")
    x = torch.randn(16, 1, 12, 12) + 1
    before = method(METHODS["norm"])(x)  # as trained
    made.reset()
    trained = copy.deepcopy(made.adapted.state_dict())
    values = [entropy(adaptive(made, x)).mean() for _ in range(4)]
    assert values == sorted(values, reverse=True)
    assert values[0] != entropy(before).mean()
    norms = {n for n, part in made.adapted.named_modules() if isinstance(part, nn.BatchNorm2d)}
    for key, value in made.adapted.state_dict().items():
        moves = key.rpartition(".")[0] in norms and key.endswith(("weight", "bias"))
        assert torch.equal(value, trained[key]) != moves, key


def test_reset_gives_the_first_output_again() -> None:
    made = method(adaptation_optimizer=SGD)
    x = torch.randn(8, 1, 12, 12)
    first = adaptive(made, x)
    assert not torch.equal(adaptive(made, x), first)
    made.reset()
    assert torch.equal(adaptive(made, x), first)


def test_predicted_before_or_after_the_step() -> None:
    x = torch.randn(8, 1, 12, 12)
    before, after = (method(adaptation_optimizer=SGD, prediction=when) for when in ("before", "after"))
    assert before.prediction == method().prediction
    first, second = adaptive(before, x), adaptive(before, x)
    assert not torch.equal(first, second)
    assert torch.allclose(adaptive(after, x), second, atol=1e-6)
    twice = method(adaptation_optimizer=SGD, adaptation_steps=2)
    assert torch.allclose(adaptive(twice, x), second, atol=1e-6), "the last of two predictions"


def test_a_single_value_per_channel_is_normalised_as_in_training() -> None:
    made = method(mode="episodic")
    x = torch.randn(1, 1, 5, 5)  # 3, 2 and 1 positions: the last layer sees one value
    assert torch.isfinite(adaptive(made, x)).all()
    layers = [layer for layer in made.adapted.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [layer.training for layer in layers] == [True, True, False]


class Small(nn.Module):
    """The network of the reference figures."""

    def __init__(self, given: dict) -> None:
        super().__init__()
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items() if name != "batches"}
        self.conv, self.norm = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)
        names = {"conv": "conv.weight", "scale": "norm.weight", "shift": "norm.bias", "head_weight": "head.weight"}
        names |= {"head_bias": "head.bias", "running_mean": "norm.running_mean", "running_var": "norm.running_var"}
        self.double().load_state_dict({names[k]: v for k, v in tensors.items() if k in names}, strict=False)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


STEPS = {"adaptation_optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
MARGIN = {**STEPS, "entropy_margin": 0.8}


@pytest.mark.parametrize(
    ("file", "case", "make"),
    [
        ("tent", "steps 1", partial(Tent, **STEPS)),
        ("tent", "steps 2", partial(Tent, adaptation_steps=2, **STEPS)),
        ("tent", "episodic", partial(Tent, mode="episodic", **STEPS)),
        ("tent", "norm", AdaptiveBatchNorm),
        ("eata", "eta", partial(EATA, fisher_weight=0, redundancy_margin=0.9, **MARGIN)),
        ("eata", "eata", partial(EATA, fisher_weight=0.5, redundancy_margin=0.9, **MARGIN)),
        ("sar", None, partial(SAR, rho=0.3, skip=(), **MARGIN)),
    ],
)
def test_figures_of_the_authors(file, case, make) -> None:
    found = json.loads((GOLDEN / f"{file}.json").read_text())
    given, wanted = found["inputs"], found["outputs"] if case is None else found["outputs"][case]
    made = make(network=lambda classes: Small(given), num_classes=4)
    made.configure_model()
    if case == "eata":
        made.reset()
        made.anchors = {
            f"norm.{ours}": (
                torch.tensor(given[f"fisher_{theirs}"]).double(),
                made.now.named[f"norm.{ours}"].detach().clone(),
            )
            for ours, theirs in (("weight", "scale"), ("bias", "shift"))
        }
    for x, logits in zip(given["batches"], wanted["logits"], strict=True):
        ours = adaptive(made, torch.tensor(x, dtype=torch.float64))
        torch.testing.assert_close(ours, torch.tensor(logits, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    for name, leaf in (("scale", "weight"), ("shift", "bias")):
        if name in wanted:
            value = getattr(made.adapted.norm, leaf).detach()
            torch.testing.assert_close(value, torch.tensor(wanted[name]).double(), rtol=1e-6, atol=1e-6)
    if "average" in wanted:
        assert made.average.tolist() == pytest.approx(wanted["average"], abs=1e-6)
