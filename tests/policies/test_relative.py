import json

import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.policies import LabeledAlignment, RelativeThreshold


def known(*rows: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows).log(), torch.zeros(len(rows), dtype=torch.long)


def test_threshold_is_the_closed_form() -> None:
    p = RelativeThreshold(2, threshold=0.9, alignment=None)
    targets, weights = p(
        torch.tensor([[0.64, 0.36], [0.37, 0.63], [0.5, 0.5]]).log(), labeled=known([0.8, 0.2], [0.4, 0.6])
    )
    assert p.thresholds().tolist() == pytest.approx([0.63, 0.63])  # 0.9 · (0.8 + 0.6) / 2
    assert targets.tolist() == [0, 1, 0]
    assert weights.tolist()[::2] == [1.0, 0.0]


def test_labels_and_weights_are_of_the_aligned_predictions() -> None:
    p = RelativeThreshold(2, alignment=lambda c: LabeledAlignment(c, momentum=0.0, length=1))
    # labeled mean (0.1, 0.9), unlabeled mean (0.5, 0.5): (0.6, 0.4) becomes (0.06, 0.36) / 0.42
    targets, weights = p(torch.tensor([[0.6, 0.4], [0.4, 0.6]]).log(), labeled=known([0.1, 0.9]))
    assert targets.tolist() == [1, 1]
    assert weights.tolist() == [1.0, 1.0]
    _, weights = p(torch.tensor([[0.7, 0.3], [0.3, 0.7]]).log(), labeled=known([0.1, 0.9]))
    assert weights.tolist() == [0.0, 1.0]  # 0.27 / 0.34 = 0.794 < 0.81


def test_reference_figures(root) -> None:
    golden = json.loads((root / "tests/golden/adamatch.json").read_text())
    given = golden["inputs"]
    p = RelativeThreshold(5, given["threshold"], lambda c: LabeledAlignment(c, given["momentum"], length=None))
    for t in range(3):
        labeled = torch.tensor(given["labeled"][t]), torch.zeros(6, dtype=torch.long)
        targets, weights = p(torch.tensor(given["unlabeled"][t]), labeled=labeled)
        aligned = torch.tensor(golden["outputs"]["aligned"][t])
        again = p.alignment.eval()(torch.tensor(given["unlabeled"][t]).softmax(1), labeled=labeled)
        p.alignment.train()
        torch.testing.assert_close(again, aligned, rtol=2e-5, atol=1e-6)  # USB adds 1e-6 to both means
        assert targets.tolist() == aligned.argmax(1).tolist()
        assert weights.tolist() == golden["outputs"]["masks"][t]


def test_two_ranks_are_one_process_on_the_joint_batch(on_ranks) -> None:
    steps = [(2 * torch.randn(8, 3), 2 * torch.randn(4, 3)) for _ in range(3)]

    def run(rank: int, ranks: int) -> dict[str, Tensor]:
        p = RelativeThreshold(3, alignment=lambda c: LabeledAlignment(c, momentum=0.5, length=2))
        weights = []
        for u, x in steps:
            mine = x.chunk(ranks)[rank]
            weights.append(p(u.chunk(ranks)[rank], labeled=(mine, torch.zeros(len(mine))))[1])
        return {"weights": torch.stack(weights), **p.state_dict()}

    joint = run(0, 1)
    parts = on_ranks(lambda rank: run(rank, 2))
    for part in parts:
        for name in p_state(joint):
            torch.testing.assert_close(part[name], joint[name], msg=name)
    assert torch.equal(torch.cat([part["weights"] for part in parts], dim=1), joint["weights"])


def p_state(results: dict[str, Tensor]) -> list[str]:
    return [name for name in results if name != "weights"]


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_number_of_classes_and_state(num_classes) -> None:
    p = RelativeThreshold(num_classes)
    labeled = torch.randn(3, num_classes, requires_grad=True), torch.zeros(3)
    _, weights = p(torch.randn(5, num_classes, requires_grad=True), labeled=labeled)
    assert not weights.requires_grad
    assert not p.thresholds().requires_grad
    assert p.thresholds().shape == (num_classes,)
    fresh = RelativeThreshold(num_classes)
    fresh.load_state_dict(p.state_dict())
    assert torch.equal(fresh.thresholds(), p.thresholds())


def test_errors_say_what_to_do() -> None:
    with pytest.raises(UserError, match="labeled"):
        RelativeThreshold(3)(torch.zeros(2, 3))
    with pytest.raises(UserError, match="threshold=2"):
        RelativeThreshold(3, threshold=2)
