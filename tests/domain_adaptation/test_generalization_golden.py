"""Against figures of DomainBed's own code, on a linear head."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import zoo
from zoo.losses import irm_penalty, mean_over_domains, pairwise_coral, pairwise_mmd

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "da_generalization.json").read_text())
INPUTS, OUTPUTS = GOLDEN["inputs"], GOLDEN["outputs"]
S = INPUTS["domains"]
H = torch.tensor(INPUTS["features"], dtype=torch.float64)
Y = torch.tensor(INPUTS["labels"])
DOMAIN = torch.arange(S).repeat_interleave(len(Y) // S)


class Head(nn.Module):
    """A network that is nothing but their head."""

    num_features = 3

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.backbone, self.dropout = nn.Identity(), nn.Identity()
        self.head = nn.Linear(3, num_outputs).double()
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(INPUTS["weight"]))
            self.head.bias.copy_(torch.tensor(INPUTS["bias"]))

    def features(self, x):
        return x

    def logits(self, x):
        return self.head(x)

    def forward(self, x):
        return self.head(x)


def method(name: str, **arguments):
    sgd = partial(torch.optim.SGD, lr=0.1)
    made = getattr(zoo, name)(network=Head, num_classes=3, num_domains=S, optimizer=sgd, **arguments)
    made.configure_model()
    made._trainer = SimpleNamespace(global_step=10**6, estimated_stepping_batches=10**6, training=False)
    return made.double()


def batch(x: torch.Tensor = H) -> dict:
    return {"source": {"image": x, "label": Y, "domain": DOMAIN}}


def close(ours: torch.Tensor, theirs: list, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(ours.double(), torch.tensor(theirs, dtype=torch.float64), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "key", "arguments"),
    [("IRM", "irm", {"penalty_weight": 100.0}), ("VREx", "vrex", {"penalty_weight": 10.0})],
)
def test_penalized_steps(name, key, arguments) -> None:
    made = method(name, annealing_steps=5, **arguments)
    loss = made.training_step(batch(), 0)
    loss.backward()
    assert loss.item() == pytest.approx(OUTPUTS[key]["loss"], rel=1e-6)
    for parameter, gradient in OUTPUTS[key]["grad"].items():
        close(made.network.head.get_parameter(parameter).grad, gradient)


def test_irm_penalties_of_each_domain() -> None:
    values, counts = irm_penalty(Head(3)(H), Y, DOMAIN, S)
    close(values, OUTPUTS["irm_penalties"])
    assert mean_over_domains(values, counts).item() == pytest.approx(OUTPUTS["irm"]["penalty"], rel=1e-6)


def test_group_dro_steps() -> None:
    made = method("GroupDRO", rate=0.5)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for theirs in OUTPUTS["group_dro"]:
        optimizer.zero_grad()
        loss = made.training_step(batch(), 0)
        loss.backward()
        assert loss.item() == pytest.approx(theirs["loss"], rel=1e-6)
        close(made.weights, theirs["q"])
        close(made.network.head.weight.grad, theirs["grad"]["weight"])
        optimizer.step()
        close(made.network.head.weight, theirs["weight"])


@pytest.mark.parametrize(("key", "distance"), [("mmd", pairwise_mmd), ("coral", pairwise_coral)])
def test_discrepancies_with_their_gradients(key, distance) -> None:
    x = H.clone().requires_grad_()
    value = distance(x, DOMAIN, S)
    value.backward()
    assert value.item() == pytest.approx(OUTPUTS[key]["penalty"], rel=1e-6)
    close(x.grad, OUTPUTS[key]["grad"])
    made = method(f"{key.upper()}Generalization")
    loss = made.training_step(batch(), 0)
    assert loss.item() == pytest.approx(OUTPUTS[key]["loss"]["loss"] + OUTPUTS[key]["loss"]["penalty"], rel=1e-6)


def test_fishr_penalties_of_two_steps() -> None:
    made = method("Fishr", penalty_weight=1.0)
    for shift, theirs in zip((0.0, 0.5), OUTPUTS["fishr"], strict=True):
        x = (H + shift).requires_grad_()
        risk = nn.functional.cross_entropy(made.network(x), Y)
        loss = made.training_step(batch(x), 0) - risk
        assert loss.item() == pytest.approx(theirs["penalty"], rel=1e-5)
        close(torch.autograd.grad(loss, x)[0], theirs["grad"], rtol=1e-5)
