"""DAN, JAN, Deep CORAL, AFN and MCC: a term on the features beside the source's labels."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import AFN, DAN, JAN, MCC, DeepCORAL, SourceOnly
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.losses import Gaussian, class_confusion, coral, entropy, joint_mmd, mmd

NETWORK = partial(Network, backbone="lenet", in_channels=1)
SGD = partial(torch.optim.SGD, lr=0.1)
WEIGHTS = {
    DAN: "discrepancy_weight",
    JAN: "discrepancy_weight",
    DeepCORAL: "alignment_weight",
    AFN: "norm_weight",
    MCC: "confusion_weight",
}
METHODS = list(WEIGHTS)


def batch(source: int = 6, target: int = 4) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "source": {
            "image": torch.randn(source, 1, 28, 28, generator=generator),
            "label": torch.randint(3, (source,), generator=generator),
        },
        "target": {"image": torch.randn(target, 1, 28, 28, generator=generator) + 1},
    }


def method(cls: type, **arguments: Any) -> Any:
    torch.manual_seed(0)
    made = cls(network=NETWORK, num_classes=3, optimizer=SGD, **arguments)
    made.configure_model()
    return made


def loss_and_terms(made: Any, b: dict) -> tuple[Tensor, dict[str, Tensor]]:
    terms: dict[str, Tensor] = {}
    made.observe = lambda **values: terms.update(values)
    return made.training_step(b, 0), terms


@pytest.mark.parametrize("cls", METHODS)
def test_weight_zero_is_source_only_bit_for_bit(cls) -> None:
    ours, baseline = method(cls, **{WEIGHTS[cls]: 0.0}, forward_pass="split"), method(SourceOnly)
    for made in (ours, baseline):
        optimizer = made.configure_optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            made.training_step(batch(), 0).backward()
            optimizer.step()
    for a, b in zip(ours.network.parameters(), baseline.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", METHODS)
def test_terms_are_the_equations(cls) -> None:
    """Whatever the sizes of source and target; the term is of the domains that the paper says."""
    b = batch(6, 4)
    made = method(cls, **{WEIGHTS[cls]: 0.7})
    loss, terms = loss_and_terms(made, b)
    fs, ft = made.network.features(b["source"]["image"]), made.network.features(b["target"]["image"])
    zs, zt = made.network.logits(fs), made.network.logits(ft)
    lengths = [f.norm(dim=1) for f in (fs, ft)]
    wanted = {
        DAN: lambda: mmd(fs, ft, estimator="linear"),
        JAN: lambda: joint_mmd([fs, zs.softmax(1)], [ft, zt.softmax(1)], [Gaussian(), Gaussian((1.0,), 0.92**2)]),
        DeepCORAL: lambda: coral(fs, ft),
        AFN: lambda: sum(((n - n.detach() - 1) ** 2).mean() for n in lengths),
        MCC: lambda: class_confusion(zt, 2.5),
    }[cls]()
    label = F.cross_entropy(zs, b["source"]["label"])
    assert torch.allclose(loss, label + 0.7 * wanted, atol=1e-6)
    assert torch.allclose(terms["source"], label)
    ours = torch.autograd.grad(loss, made.network.backbone.parameters())
    theirs = torch.autograd.grad(label + 0.7 * wanted, made.network.backbone.parameters())
    for a, c in zip(ours, theirs, strict=True):
        assert torch.allclose(a, c, atol=1e-6)


@pytest.mark.parametrize("cls", METHODS)
def test_every_domain_moves_the_features(cls) -> None:
    """Other target images, another gradient; and it goes downhill."""
    made = method(cls, **{WEIGHTS[cls]: 10.0})
    first, second = batch(), batch()
    second["target"]["image"] = second["target"]["image"].flip(2) - 1
    gradients = []
    for b in (first, second):
        made.zero_grad()
        made.training_step(b, 0).backward()
        gradients.append(next(made.network.backbone.parameters()).grad.clone())
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (DAN, {"estimator": "biased"}),
        (JAN, {"estimator": "biased"}),
        (DeepCORAL, {}),
        (DeepCORAL, {"form": "moments", "layer": "logits"}),
    ],
)
def test_identical_domains_cost_nothing(cls, arguments) -> None:
    b = batch(6, 6)
    b["target"]["image"] = b["source"]["image"].flip(0)
    loss, terms = loss_and_terms(method(cls, **arguments), b)
    assert torch.allclose(loss, terms["source"], atol=1e-5)


def test_some_steps_bring_the_domains_together() -> None:
    for cls, weight in ((DAN, 1.0), (JAN, 1.0), (DeepCORAL, 1e6)):
        made = method(cls, **{WEIGHTS[cls]: weight})
        b = batch(8, 8)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
        values = []
        for _ in range(8):
            optimizer.zero_grad()
            loss, terms = loss_and_terms(made, b)
            loss.backward()
            optimizer.step()
            values.append(next(v.item() for k, v in terms.items() if k in ("discrepancy", "alignment")))
        assert values[-1] < values[0], cls


def test_adversarial_jan_reverses_the_maps_alone() -> None:
    plain, adversarial = method(JAN), method(JAN, adversarial=True)
    for made in (plain, adversarial):
        made.training_step(batch(), 0).backward()
    # At first the maps are the identity: the features feel the same in both.
    for a, b in zip(plain.network.parameters(), adversarial.network.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adversarial.maps.parameters())
    _, terms = loss_and_terms(adversarial, batch())
    before = terms["discrepancy"].item()
    with torch.no_grad():
        for p in adversarial.maps.parameters():
            p -= 0.01 * p.grad
    assert loss_and_terms(adversarial, batch())[1]["discrepancy"].item() > before


def test_features_of_afn_grow() -> None:
    for arguments in ({"form": "stepwise"}, {"form": "hard", "radius": 100.0}):
        made, b = method(AFN, norm_weight=1.0, **arguments), batch()
        length = made.network.features(b["target"]["image"]).norm(dim=1).mean().item()
        made.training_step(b, 0).backward()
        with torch.no_grad():
            for p in made.parameters():
                p -= 1e-4 * p.grad
        assert made.network.features(b["target"]["image"]).norm(dim=1).mean().item() > length


@pytest.mark.parametrize(
    ("cls", "arguments", "term", "wanted"),
    [
        (DAN, {"variance": 3.0}, "discrepancy", lambda fs, ft, zt: mmd(fs, ft, variance=3.0, estimator="linear")),
        (DAN, {"multipliers": (3.0, 9.0), "estimator": "pairs"}, "discrepancy",
         lambda fs, ft, zt: mmd(fs, ft, (3.0, 9.0), estimator="pairs")),
        (AFN, {"step": 3.0}, "norm", lambda fs, ft, zt: torch.tensor(2 * 3.0**2)),
        (AFN, {"form": "hard", "radius": 9.0}, "norm",
         lambda fs, ft, zt: (fs.norm(dim=1).mean() - 9) ** 2 + (ft.norm(dim=1).mean() - 9) ** 2),
        (MCC, {"temperature": 0.1}, "confusion", lambda fs, ft, zt: class_confusion(zt, 0.1)),
    ],
)  # fmt: skip
def test_arguments_reach_the_term(cls, arguments, term, wanted) -> None:
    made, b = method(cls, **{WEIGHTS[cls]: 2.0}, **arguments), batch()
    _, terms = loss_and_terms(made, b)
    fs, ft = (made.network.features(b[role]["image"]) for role in ("source", "target"))
    assert torch.allclose(terms[term], 2.0 * wanted(fs, ft, made.network.logits(ft)), rtol=1e-4)


def test_entropy_of_afn_is_the_targets() -> None:
    b = batch()
    made = method(AFN, entropy_weight=0.1)
    _, terms = loss_and_terms(made, b)
    assert torch.allclose(terms["entropy"], 0.1 * entropy(made.network(b["target"]["image"])).mean())


def test_coral_of_the_logits() -> None:
    b = batch()
    made = method(DeepCORAL, layer="logits", form="moments")
    _, terms = loss_and_terms(made, b)
    wanted = coral(made.network(b["source"]["image"]), made.network(b["target"]["image"]), "moments")
    assert wanted > 0
    assert torch.allclose(terms["alignment"], wanted)


def test_what_was_published_with_each_domain_by_itself() -> None:
    assert [method(cls).forward_pass for cls in METHODS] == ["split", "joint", "split", "split", "joint"]


def test_looks_are_logged_where_somebody_looks() -> None:
    made = method(AFN)
    made._trainer = SimpleNamespace(
        training=True, _logger_connector=SimpleNamespace(should_update_logs=True), global_step=0
    )
    _, terms = loss_and_terms(made, batch())
    assert {"source_length", "target_length", "norm"} <= terms.keys()


@pytest.mark.parametrize(
    ("cls", "arguments", "match"),
    [
        (DAN, {"discrepancy_weight": -1.0}, "DAN: discrepancy_weight=-1.0"),
        (DAN, {"estimator": "lineer"}, "linear"),
        (DAN, {"multipliers": ()}, "multipliers"),
        (DAN, {"variance": 0.0}, "variance=0.0"),
        (JAN, {"sigma": 0.0}, "sigma=0.0"),
        (JAN, {"estimator": "quadratic"}, "estimator='quadratic'"),
        (JAN, {"discrepancy_weight": -1.0}, "discrepancy_weight"),
        (DeepCORAL, {"layer": "feature"}, "features"),
        (DeepCORAL, {"form": "mean"}, "form='mean'"),
        (DeepCORAL, {"alignment_weight": -1.0}, "alignment_weight"),
        (AFN, {"form": "soft"}, "form='soft'"),
        (AFN, {"radius": -1.0}, "radius=-1.0"),
        (MCC, {"temperature": 0.0}, "temperature=0.0"),
        (MCC, {"confusion_weight": -1.0}, "confusion_weight"),
    ],
)
def test_refusals(cls, arguments, match) -> None:
    with pytest.raises(UserError, match=match):
        method(cls, **arguments)
