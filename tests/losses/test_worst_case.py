import json
import math
from pathlib import Path

import pytest
import torch

from zoo.losses import worst_case_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "worst_case.json").read_text())


def test_reference_figures() -> None:
    given = {name: torch.tensor(v).double() for name, v in GOLDEN["inputs"].items()}
    labeled, unlabeled = (given[f"worst_{kind}"].requires_grad_() for kind in ("labeled", "unlabeled"))
    labels, pseudo_labels = (given[f"main_{kind}"].argmax(1) for kind in ("labeled", "unlabeled"))
    loss = worst_case_loss(labeled, labels, unlabeled, pseudo_labels, GOLDEN["inputs"]["labeled_weight"])
    loss.backward()
    expected = GOLDEN["outputs"]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    torch.testing.assert_close(labeled.grad, torch.tensor(expected["gradient_labeled"]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(unlabeled.grad, torch.tensor(expected["gradient_unlabeled"]).double(), atol=1e-5, rtol=0)


def test_by_hand() -> None:
    # labeled: 2 log 2; unlabeled: probability 3/4 of the pseudo-label leaves 1/4
    logits = torch.tensor([[math.log(3.0), 0.0]])
    loss = worst_case_loss(torch.zeros(1, 2), torch.tensor([1]), logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(2 * math.log(2) + math.log(4))


def test_finite_and_pulling_where_the_pseudo_label_is_certain() -> None:
    unlabeled = torch.tensor([[80.0, 0.0, 0.0]], requires_grad=True)
    loss = worst_case_loss(torch.zeros(1, 3), torch.tensor([0]), unlabeled, torch.tensor([0]), labeled_weight=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(80 - math.log(2), rel=1e-6)
    assert unlabeled.grad[0].tolist() == pytest.approx([1.0, -0.5, -0.5])


def test_smallest_where_labels_are_fitted_and_pseudo_labels_defied() -> None:
    labels = torch.tensor([0, 1])
    fitted, defied = torch.eye(3)[:2] * 50, torch.eye(3)[[2, 2]] * 50
    assert worst_case_loss(fitted, labels, defied, labels).item() == pytest.approx(0.0, abs=1e-6)
