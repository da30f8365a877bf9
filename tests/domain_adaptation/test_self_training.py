"""Self-ensembling, FixMatch as adaptation, CST: the target's own predictions teach."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import EMATeacher
from zoo import CST, FST, FixMatchAdaptation, SelfEnsembling, SourceOnly
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.losses import class_balance, reverse_loss, tsallis_confusion

NETWORK = partial(Network, backbone="lenet", in_channels=1)
NORMED = partial(Network, backbone="lenet", in_channels=1, arguments={"norm": True})
SGD = partial(torch.optim.SGD, lr=0.1)
OFF = {
    SelfEnsembling: {"consistency_weight": 0.0},
    FixMatchAdaptation: {"self_training_weight": 0.0},
    CST: {"reverse_weight": 0.0, "entropy_weight": 0.0, "self_training_weight": 0.0, "rho": 0.0},
}


def batch(source: int = 6, target: int = 4) -> dict:
    generator = torch.Generator().manual_seed(1)
    views = {v: torch.randn(target, 1, 28, 28, generator=generator) for v in ("weak", "weak_2", "strong")}
    return {
        "source": {
            "image": torch.randn(source, 1, 28, 28, generator=generator),
            "label": torch.randint(3, (source,), generator=generator),
        },
        "target": views,
    }


def method(cls: type, network: Any = NETWORK, **arguments: Any) -> Any:
    torch.manual_seed(0)
    made = cls(network=network, num_classes=3, optimizer=SGD, **arguments)
    made.configure_model()
    return made


def terms_of(made: Any, b: dict) -> tuple[Tensor, dict[str, Tensor]]:
    terms: dict[str, Tensor] = {}
    made.observe = lambda **values: terms.update(values)
    return made.training_step(b, 0), terms


@pytest.mark.parametrize("cls", list(OFF))
def test_weight_zero_is_source_only_bit_for_bit(cls) -> None:
    ours, baseline = method(cls, **OFF[cls], forward_pass="split"), method(SourceOnly)
    for made in (ours, baseline):
        optimizer = made.configure_optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            made.training_step(batch(), 0).backward()
            optimizer.step()
    for a, b in zip(ours.network.parameters(), baseline.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", list(OFF))
def test_joint_and_split_are_the_same_without_batch_norm(cls) -> None:
    losses = [method(cls, forward_pass=how).training_step(batch(), 0) for how in ("joint", "split")]
    assert torch.allclose(*losses, atol=1e-5)


def test_self_ensembling_is_its_equation() -> None:
    b = batch()
    made = method(SelfEnsembling, momentum=0.9, balance_weight=0.5, consistency_weight=2.0)
    assert made.teacher.momentum == 0.9
    with torch.no_grad():
        for network, scale in ((made.network, 8), (made.teacher.module, 12)):
            next(network.head.parameters()).mul_(scale)  # no two predictions alike
    p_student = made.network(b["target"]["weak_2"]).softmax(1)
    p_teacher = made.teacher(b["target"]["weak"]).softmax(1)
    made.threshold = p_teacher.amax(1).sort().values[1].item()
    mask = (p_teacher.amax(1) > made.threshold).float()
    loss, terms = terms_of(made, b)
    assert terms["utilization"] == mask.mean() == 0.5
    wanted = {
        "source": F.cross_entropy(made.network(b["source"]["image"]), b["source"]["label"]),
        "consistency": 2.0 * (mask * (p_student - p_teacher).square().mean(1)).sum() / 4,
        "balance": 2.0 * 0.5 * 0.5 * class_balance(p_student),
    }
    for name, value in wanted.items():
        assert torch.allclose(terms[name], value, rtol=1e-4), name
    assert torch.allclose(loss, sum(wanted.values()))
    loss.backward()
    assert all(p.grad is None for p in made.teacher.parameters())


def test_threshold_leaves_out_whom_the_teacher_doubts() -> None:
    made = method(SelfEnsembling, threshold=0.99)
    loss, terms = terms_of(made, batch())
    assert torch.allclose(loss, terms["source"])
    assert terms["utilization"] == 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modes_of_the_teacher(mode) -> None:
    made = method(SelfEnsembling, NORMED, teacher_mode=mode, threshold=0.0)
    layer = next(m for m in made.teacher.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = layer.running_mean.clone()
    loss, _ = terms_of(made, batch())
    assert torch.equal(layer.running_mean, before) == (mode == "eval")
    assert not layer.training
    assert torch.isfinite(loss)


def test_fixmatch_is_its_equation_and_labels_carry_no_gradient() -> None:
    b = batch()
    made = method(FixMatchAdaptation)
    q = made.network(b["target"]["weak"]).softmax(1)
    made.threshold = q.amax(1).median().item()
    mask = (q.amax(1) >= made.threshold).float()
    assert 0 < mask.mean() < 1
    strong = F.cross_entropy(made.network(b["target"]["strong"]), q.argmax(1), reduction="none")
    wanted = F.cross_entropy(made.network(b["source"]["image"]), b["source"]["label"]) + (mask * strong).sum() / 4
    loss, _ = terms_of(made, b)
    assert torch.allclose(loss, wanted)
    for how in ("joint", "split"):
        made = method(FixMatchAdaptation, threshold=0.1, forward_pass=how)
        b["target"]["weak"].requires_grad_()
        made.training_step(b, 0).backward()
        assert b["target"]["weak"].grad is None or b["target"]["weak"].grad.abs().sum() == 0


def test_fixmatch_passes_three_times_or_once() -> None:
    counts = []
    for how in ("split", "joint"):
        made = method(FixMatchAdaptation, NORMED, forward_pass=how)
        made.training_step(batch(), 0)
        counts.append(int(next(m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)).num_batches_tracked))
    assert counts == [3, 1]


def cst_loss(made: Any, network: Any, b: dict) -> Tensor:
    fs, ft = network.features(b["source"]["image"]), network.features(b["target"]["weak"])
    zs, zt = network.logits(fs), network.logits(ft)
    confidence, guesses = zt.detach().softmax(1).max(1)
    strong = F.cross_entropy(network(b["target"]["strong"]), guesses, reduction="none")
    labels = b["source"]["label"]
    return (
        F.cross_entropy(zs, labels)
        + 0.5 * reverse_loss(fs, labels, ft, guesses, 3)
        + 0.08 * tsallis_confusion(zt, 1.9, 2.0)
        + 0.5 * ((confidence >= made.threshold) * strong).mean()
    )


def test_cst_is_its_equation() -> None:
    made, b = method(CST, rho=0.0, threshold=0.34), batch()
    loss, _ = terms_of(made, b)
    assert torch.allclose(loss, cst_loss(made, made.network, b), atol=1e-6)


def test_arguments_of_cst_reach_its_terms() -> None:
    arguments = {"reverse_weight": 2.0, "entropy_weight": 3.0, "self_training_weight": 4.0}
    b = batch()
    made = method(CST, rho=0.0, threshold=1.0, alpha=1.5, temperature=0.5, ridge=0.3, **arguments)
    fs, ft = made.network.features(b["source"]["image"]), made.network.features(b["target"]["weak"])
    zt = made.network.logits(ft)
    _, terms = terms_of(made, b)
    wanted = {
        "reverse": 2 * reverse_loss(fs, b["source"]["label"], ft, zt.argmax(1), 3, 0.3),
        "entropy": 3 * tsallis_confusion(zt, 1.5, 0.5),
        "self_training": torch.tensor(0.0),
    }
    for name, value in wanted.items():
        assert torch.allclose(terms[name], value, rtol=1e-4), name


def test_cst_takes_the_gradient_at_the_worst_weights_nearby() -> None:
    """By hand: ε = ρ θ² g / |θ g|, and the gradient of the same loss there."""
    made, b = method(CST, rho=0.5, threshold=0.34), batch()
    names = [name for name, _ in made.network.named_parameters()]
    parameters = list(made.network.parameters())
    before = [p.detach().clone() for p in parameters]
    gradients = torch.autograd.grad(cst_loss(made, made.network, b), parameters)
    norm = torch.cat([(p * g).flatten() for p, g in zip(parameters, gradients, strict=True)]).norm()
    there = copy.deepcopy(made.network)
    with torch.no_grad():
        for p, q, g in zip(there.parameters(), parameters, gradients, strict=True):
            p.copy_(q + 0.5 * q**2 * g / norm)
    wanted = torch.autograd.grad(cst_loss(made, there, b), list(there.parameters()))
    made.training_step(b, 0).backward()
    for name, p, old, g in zip(names, parameters, before, wanted, strict=True):
        assert torch.equal(p, old), name
        assert torch.allclose(p.grad, g, atol=1e-4, rtol=1e-3), name
    assert not all(torch.allclose(a, c, atol=1e-4) for a, c in zip(gradients, wanted, strict=True))


def test_cst_remembers_statistics_of_the_first_pass_alone() -> None:
    made = method(CST, NORMED)
    made.training_step(batch(), 0)
    layer = next(m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert int(layer.num_batches_tracked) == 2  # source with weak, strong
    assert layer.track_running_stats


def looks_ahead(tmp_path, steps: int, **arguments: Any) -> Any:
    torch.manual_seed(0)
    inner = partial(SelfEnsembling, momentum=0.9, threshold=0.0, **arguments)
    made = FST(method=inner, steps=steps, network=NORMED, num_classes=3, optimizer=SGD) if steps >= 0 else None
    made = made or inner(network=NORMED, num_classes=3, optimizer=SGD)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[EMATeacher()],
    )  # fmt: skip
    trainer.fit(made, DataLoader([batch(), batch()], batch_size=None))
    return made


def test_fst_without_steps_is_self_ensembling_and_with_steps_another(tmp_path) -> None:
    plain, none, some = (looks_ahead(tmp_path, steps) for steps in (-1, 0, 2))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, none.state_dict()[name]), name
    teacher = [name for name, _ in plain.named_parameters() if name.startswith("teacher.")]
    assert any(not torch.equal(plain.state_dict()[n], some.state_dict()[n]) for n in teacher)
    assert int(some.method.teacher.updates) == 2
    assert some.source_views == ("image",)
    assert some.target_views == ("weak", "weak_2")


@pytest.mark.parametrize(
    ("cls", "arguments", "match"),
    [
        (SelfEnsembling, {"momentum": 1.5}, "momentum=1.5"),
        (SelfEnsembling, {"threshold": 1.0}, "threshold=1.0"),
        (SelfEnsembling, {"balance_weight": -1.0}, "balance_weight"),
        (SelfEnsembling, {"teacher_mode": "evaluation"}, "teacher_mode"),
        (FixMatchAdaptation, {"threshold": 0.0}, "threshold=0.0"),
        (FixMatchAdaptation, {"self_training_weight": -1.0}, "self_training_weight"),
        (CST, {"ridge": 0.0}, "ridge=0.0"),
        (CST, {"rho": -1.0}, "rho=-1.0"),
        (CST, {"threshold": math.inf}, "threshold=inf"),
    ],
)
def test_refusals(cls, arguments, match) -> None:
    with pytest.raises(UserError, match=match):
        method(cls, **arguments)
