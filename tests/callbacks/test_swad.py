import json
import random
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import SWAD, RunSummary
from callbacks.swad import Average, exchanged
from datamodules import Blobs, GeneralizationData
from zoo import ERM
from zoo.core.errors import UserError
from zoo.core.method import Method
from zoo.core.network import Network


def by_hand(losses: list[float], every: int, steps: int, converge: int, tolerance: int, ratio: float):
    """Algorithm 1 on the whole list of steps; weights are the number of the step. Returns start, end and mean."""
    threshold, start, end = None, None, steps
    for k in range(len(losses)):
        if threshold is None:
            window = losses[max(k - converge + 1, 0) : k + 1]
            if len(window) == converge and window[0] == min(window):
                start = (k - converge + 2) * every
                threshold = (1 + ratio) * sum(window) / converge
        elif k + 1 > tolerance and min(losses[k - tolerance + 1 : k + 1]) > threshold:
            end = (k - tolerance + 1) * every
            break
    if start is None:
        return None, steps, None
    values = [float(t) ** 2 for t in range(start, end + 1)]
    return start, end, sum(values) / len(values)


def played(swad: SWAD, losses: list[float], every: int, steps: int, reload: bool = False) -> SWAD:
    for t in range(1, steps + 1):
        weights = [torch.tensor([float(t) ** 2], dtype=torch.float64)]
        swad.stepped(weights)
        if t % every == 0:
            swad.evaluated(losses[t // every - 1], t, weights)
        if reload:
            state, swad = swad.state_dict(), SWAD(swad.converge, swad.tolerance, swad.tolerance_ratio)
            swad.load_state_dict(state)
    return swad


@pytest.mark.parametrize("seed", range(60))
def test_the_valley_is_that_of_the_papers_loop(seed) -> None:
    draw = random.Random(seed)
    converge, tolerance, every = draw.randint(1, 4), draw.randint(1, 6), draw.randint(1, 4)
    count = draw.randint(1, 25)
    turn = draw.randint(2, 20)
    losses = [2.0 / (1 + k) + draw.random() * 0.4 + (0.3 * (k - turn) if k > turn else 0) for k in range(count)]
    steps = count * every + draw.randint(0, every - 1)
    start, end, mean = by_hand(losses, every, steps, converge, tolerance, 0.3)
    swad = played(SWAD(converge, tolerance, 0.3), losses, every, steps, reload=seed % 2 == 0)
    assert swad.start_step == start
    assert (swad.end_step or steps) == end
    if start is not None:
        assert swad.average()[0].item() == pytest.approx(mean, rel=1e-9)


def test_the_loops_found_valleys_that_end_and_valleys_that_do_not() -> None:
    """The test above would otherwise prove little."""
    assert by_hand([3, 2, 1, 1.1, 1.2, 5, 5, 5, 5], 2, 18, 3, 2, 0.3)[:2] == (6, 10)
    assert by_hand([3, 2, 1, 1.1, 1.2, 1.3, 1.2], 2, 14, 3, 2, 0.3)[:2] == (6, 14)
    assert by_hand([1, 2, 3, 9, 9], 1, 5, 3, 2, 0.3)[:2] == (1, 2)
    assert by_hand([5, 4, 3, 2, 1], 1, 5, 3, 2, 0.3)[0] is None


def test_without_a_valley_the_last_segment_counts() -> None:
    swad = played(SWAD(), [3.0, 2.0], 2, 4)
    assert swad.start_step is None
    assert swad.average()[0].item() == (9 + 16) / 2
    swad.stepped([torch.tensor([25.0])])
    assert swad.average()[0].item() == 25


def test_averages_are_32_bit_and_do_not_follow_what_they_were_given() -> None:
    average, x = Average(), torch.ones(3, dtype=torch.bfloat16)
    average.add([x])
    x += 1
    average.add([x], 3)
    assert average.values[0].dtype == torch.float32
    assert average.values[0].tolist() == [1.75] * 3
    average.join(Average())
    assert average.count == 4


class Losses(SWAD):
    """Plays losses instead of those of the validation."""

    played = (3.0, 2.0, 1.0, 1.1, 1.05, 9.0, 9.0, 9.0, 9.0, 9.0)

    def evaluated(self, loss, step, weights) -> None:
        assert loss > 0
        super().evaluated(self.played[step // 6 - 1], step, weights)


class Weights(SWAD):
    """Remembers all weights."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.all = []

    def stepped(self, weights) -> None:
        self.all.append([w.clone() for w in weights])
        super().stepped(weights)


def test_a_run_writes_tests_and_goes_on_with_its_own_weights(method, points, trainer, tmp_path) -> None:
    class Both(Weights, Losses):
        pass

    swad, plain, data = Both(converge=3, tolerance=2), method(), points()
    run = trainer(swad, RunSummary(test_after_fit=True, picture=False, table=False), max_epochs=20)
    run.fit(plain, datamodule=data)
    assert (swad.start_step, swad.end_step) == (18, 30)
    assert run.global_step == 42, "stopped by the end of the valley"
    content = torch.load(tmp_path / "checkpoints" / "swad.ckpt", weights_only=True)
    names = [name for name, _ in plain.named_parameters()]
    for i, name in enumerate(names):
        mean = torch.stack([weights[i].double() for weights in swad.all[17:30]]).mean(0)
        assert torch.allclose(content["state_dict"][name].double(), mean, atol=1e-6)
        assert torch.equal(plain.state_dict()[name], swad.all[-1][i])
    # running averages belong to the averaged weights: the mean over the training batches
    layer = next(name for name in content["state_dict"] if name.endswith("running_mean"))
    assert not torch.equal(content["state_dict"][layer], plain.state_dict()[layer])
    with exchanged(plain, [content["state_dict"][name] for name in names]), torch.no_grad():
        means = [plain.network.layer(batch["labeled"]["image"].flatten(1)).mean(0) for batch in data.train_dataloader()]
        assert torch.allclose(content["state_dict"][layer], torch.stack(means).mean(0), atol=1e-6)
    assert plain.network.norm.momentum == 0.1
    found = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert "swad/test/accuracy" in found
    loaded = Method.load_from_checkpoint(tmp_path / "checkpoints" / "swad.ckpt", network=plain.network_recipe)
    right = [loaded.eval()(b["image"]).argmax(1) == b["label"] for b in data.test_dataloader()["test"]]
    assert torch.cat(right).float().mean().item() == pytest.approx(found["swad/test/accuracy"], abs=1e-6)


@pytest.mark.parametrize("half", [9, 12, 20, 33])
def test_resumes_exactly(trainer, tmp_path, half) -> None:
    class SaveAt(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == half:
                trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)

    def run(*more, ckpt=None):
        torch.manual_seed(0)
        network = partial(Network, backbone="tiny_mlp", in_channels=1, image_size=8)
        made = ERM(network=network, num_classes=3, num_domains=1, optimizer=partial(torch.optim.SGD, lr=0.1))
        data = GeneralizationData(Blobs(), Blobs(seed=1), batch_size=4, steps=6, val_size=9)
        swad = Losses(converge=3, tolerance=2, stop=False, test=False)
        short = trainer(*more, swad, max_epochs=9)  # a checkpoint in front of it owes it a step
        short.fit(made, datamodule=data, ckpt_path=ckpt, weights_only=True)
        return swad

    whole, resumed = run(SaveAt()), run(ckpt=tmp_path / "half.ckpt")
    assert (whole.start_step, whole.end_step) == (resumed.start_step, resumed.end_step) == (18, 30)
    for a, b in zip(whole.average(), resumed.average(), strict=True):
        assert torch.equal(a, b)


def test_the_loss_is_the_mean_of_the_first_loader(method, points, trainer) -> None:
    seen = []

    class Look(SWAD):
        def evaluated(self, loss, step, weights) -> None:
            seen.append((loss, step))

    plain, data = method(), points()
    trainer(Look(test=False), max_epochs=1).fit(plain, datamodule=data)
    x, y, _ = data.points.tensors
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(plain.eval()(x), y).item()
    assert seen == [(pytest.approx(wanted, abs=1e-6), 6)]
    assert not plain._forward_hooks


@pytest.mark.parametrize(
    "arguments", [{"converge": 0}, {"tolerance": 0}, {"tolerance_ratio": -1}, {"batch_norm_steps": 0}]
)
def test_refusals(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        SWAD(**arguments)
