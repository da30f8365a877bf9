"""Figures of the reference implementations, see tests/golden/da_discrepancy.json."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.losses import (
    Gaussian,
    centroid_labels,
    class_balance,
    class_confusion,
    coral,
    information_maximization,
    joint_mmd,
    mmd,
    reverse_loss,
    stepwise_feature_norm,
    tsallis_confusion,
)

FIGURES = json.loads((Path(__file__).parents[1] / "golden" / "da_discrepancy.json").read_text())
OUT = FIGURES["outputs"]
CONSTANT = 2 / (6 - 1)  # TLlib adds it, for n = 6


def given(name: str) -> Tensor:
    return numbers(FIGURES["inputs"][name])


def numbers(values: list) -> Tensor:
    whole = torch.tensor(values).dtype == torch.int64
    return torch.tensor(values, dtype=torch.int64 if whole else torch.float64)


def test_mmd_of_tllib() -> None:
    x, y = given("x").requires_grad_(), given("y")
    assert mmd(x, y).item() + CONSTANT == pytest.approx(OUT["dan_quadratic"], abs=1e-10)
    linear = mmd(x, y, estimator="linear")
    assert linear.item() + CONSTANT == pytest.approx(OUT["dan_linear"], abs=1e-10)
    linear.backward()
    torch.testing.assert_close(x.grad, numbers(OUT["dan_linear_gradient"]))


def test_joint_mmd_of_tllib() -> None:
    layers = [given("x"), given("logits_x").softmax(1)], [given("y"), given("logits_y").softmax(1)]
    kernels = Gaussian(), Gaussian((1.0,), 0.92**2)
    assert joint_mmd(*layers, kernels).item() + CONSTANT == pytest.approx(OUT["jan"], abs=1e-10)
    assert joint_mmd(*layers, kernels, "linear").item() + CONSTANT == pytest.approx(OUT["jan_linear"], abs=1e-10)


def test_mmd_of_pytorch_adapt() -> None:
    """Its exp(-s d² / b) is variance b and multiplier 1 / (2 s); its kernels are averaged."""
    scales = given("scales")
    arguments = {"multipliers": (0.5 / scales).tolist(), "variance": OUT["pa_bandwidth"]}
    x, y = given("x"), given("y")
    assert mmd(x, y, **arguments).item() / 4 == pytest.approx(OUT["pa_quadratic"], abs=1e-10)
    assert mmd(x, y, **arguments, estimator="pairs").item() / 4 == pytest.approx(OUT["pa_linear"], abs=1e-10)


def test_both_corals() -> None:
    assert coral(given("x"), given("y")).item() == pytest.approx(OUT["coral_paper"], abs=1e-10)
    assert coral(given("x"), given("y"), "moments").item() == pytest.approx(OUT["coral_moments"], abs=1e-10)


def test_feature_norm_of_tllib() -> None:
    x = given("x").requires_grad_()
    loss = stepwise_feature_norm(x)
    assert loss.item() == pytest.approx(OUT["safn"], abs=1e-10)
    loss.backward()
    torch.testing.assert_close(x.grad, numbers(OUT["safn_gradient"]))


def test_class_confusion_of_tllib() -> None:
    """To what its 1e-5 inside the logarithm changes."""
    logits = given("logits_x").requires_grad_()
    loss = class_confusion(logits, 2.5)
    assert loss.item() == pytest.approx(OUT["mcc"], abs=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad, numbers(OUT["mcc_gradient"]), atol=1e-5, rtol=0)


def test_self_ensembling_terms_of_tllib() -> None:
    p, q = given("logits_x").softmax(1), given("logits_y").softmax(1)
    assert class_balance(p).item() / 3 == pytest.approx(OUT["class_balance"], abs=1e-10)
    assert 3 * (given("mask") * (p - q).square().mean(1)).mean().item() == pytest.approx(OUT["consistency"], abs=1e-10)


def test_cycle_self_training() -> None:
    logits = given("logits_x").requires_grad_()
    entropy = tsallis_confusion(logits, 1.9, 2.0)
    assert entropy.item() == pytest.approx(OUT["cst_entropy"], abs=1e-5)
    entropy.backward()
    torch.testing.assert_close(logits.grad, numbers(OUT["cst_entropy_gradient"]), atol=1e-5, rtol=0)
    x, y = given("x").requires_grad_(), given("y").requires_grad_()
    loss = reverse_loss(x, given("labels"), y, given("pseudo_labels"), 3)
    assert loss.item() == pytest.approx(OUT["cst_reverse"], abs=1e-6)
    loss.backward()
    for tensor, gradient in zip((x, y), OUT["cst_reverse_gradients"], strict=True):
        torch.testing.assert_close(tensor.grad, numbers(gradient), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("threshold", [0, 8])
def test_labels_of_shot(distance, threshold) -> None:
    features = given("shot_features")
    probabilities = (features @ given("shot_head").T).softmax(1)
    labels = centroid_labels(features, probabilities, distance, threshold)
    assert labels.tolist() == OUT[f"shot_{distance}_{threshold}"]


def test_information_of_shot() -> None:
    loss = information_maximization(given("logits_x"), epsilon=1e-5)
    assert loss.item() == pytest.approx(OUT["shot_information"], abs=1e-10)
