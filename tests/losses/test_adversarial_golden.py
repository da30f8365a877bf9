"""Against TLlib's own figures: see the recipe in tests/golden/da_adversarial.json."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.core.gradient_reversal import reverse_gradient
from zoo.core.schedules import dann_ramp
from zoo.domain_adaptation.discriminators import MultilinearMap
from zoo.losses import (
    class_balance_loss,
    classifier_discrepancy,
    domain_loss,
    entropy_weights,
    margin_disparity_loss,
    spectral_penalty,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "da_adversarial.json").read_text())
OUT = GOLDEN["outputs"]


def inputs(*names: str) -> list[Tensor]:
    return [torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64).requires_grad_() for name in names]


def same(ours: Tensor, theirs: object, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(
        ours.detach(), torch.tensor(theirs, dtype=ours.dtype), rtol=tolerance, atol=tolerance, check_dtype=False
    )


@pytest.mark.parametrize(("name", "weighted", "tolerance"), [("cdan", False, 1e-7), ("cdan_entropy", True, 2e-5)])
def test_conditional_adversarial_loss(name, weighted, tolerance) -> None:
    source, target, source_logits, target_logits, weight, bias = inputs(
        "source_features", "target_features", "source_logits", "target_logits", "weight", "bias"
    )
    join = MultilinearMap(4, 3)
    joined = torch.cat(
        [join(source, source_logits.detach().softmax(1)), join(target, target_logits.detach().softmax(1))]
    )
    same(joined, OUT["outer_product"])
    domains = (reverse_gradient(joined, dann_ramp(500 / 10_000)) @ weight.T + bias).squeeze(1)
    weights = entropy_weights(source_logits, target_logits) if weighted else (None, None)
    loss = domain_loss(domains[:5], domains[5:], *weights)
    loss.backward()
    same(loss, OUT[name]["loss"], tolerance)
    same(source.grad, OUT[name]["source_features_gradient"], tolerance)
    same(weight.grad, OUT[name]["weight_gradient"], tolerance)
    assert source_logits.grad is None


def test_entropy_weights() -> None:
    same(torch.cat(entropy_weights(*inputs("source_logits", "target_logits"))), OUT["entropy_weights"], 2e-5)


def test_margin_disparity() -> None:
    source, target, against_s, against_t = inputs(
        "source_logits", "target_logits", "source_adversary", "target_adversary"
    )
    loss = margin_disparity_loss(source, against_s, target, against_t, 4.0)
    loss.backward()
    theirs = OUT["mdd"]
    same(loss, theirs["loss"], 2e-5)
    same(against_s.grad, theirs["source_adversary_gradient"], 1e-6)
    same(against_t.grad, theirs["target_adversary_gradient"], 2e-5)


def test_spectral_penalty() -> None:
    source, target = inputs("source_features", "target_features")
    loss = spectral_penalty(source) + spectral_penalty(target)
    loss.backward()
    same(loss, OUT["bsp"]["loss"])
    same(source.grad, OUT["bsp"]["source_features_gradient"])


def test_classifier_discrepancy_and_balance() -> None:
    first, second = inputs("source_logits", "source_adversary")
    same(classifier_discrepancy(first, second), OUT["classifier_discrepancy"])
    same(class_balance_loss(first), OUT["class_balance"])


def test_reversal_schedule() -> None:
    for iteration, strength in OUT["reversal"].items():
        assert dann_ramp(int(iteration) / 10_000) == pytest.approx(strength, abs=1e-9)
