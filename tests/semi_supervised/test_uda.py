import json
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zoo import UDA
from zoo.core.criteria import Criterion
from zoo.core.errors import UserError
from zoo.policies import Threshold


class Given(nn.Module):
    """Logits are the input itself, times one weight."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def uda(num_classes: int = 2, **arguments) -> UDA:
    method = UDA(network=Given, num_classes=num_classes, **arguments)
    method.configure_model()
    return method


def batch(x: Tensor, weak: Tensor, strong: Tensor) -> dict[str, dict[str, Tensor]]:
    return {
        "labeled": {"image": x, "label": torch.zeros(len(x), dtype=torch.long)},
        "unlabeled": {"weak": weak, "strong": strong},
    }


def test_unlabeled_loss_by_hand() -> None:
    # confidence 0.9 passes 0.8; T = 0.5 squares the odds: 81 : 1
    policy = partial(Threshold, threshold=0.8, temperature=0.5, soft=True)
    b = batch(torch.zeros(1, 2), torch.tensor([[0.9, 0.1], [0.7, 0.3]]).log(), torch.tensor([[0.6, 0.4]] * 2).log())
    loss = uda(policy=policy).training_step(b, 0)
    expected = -(81 * math.log(0.6) + math.log(0.4)) / 82
    assert loss.item() == pytest.approx(math.log(2) + expected / 2)


def test_paper_defaults_against_reference_figures(root) -> None:
    golden = json.loads((root / "tests/golden/uda.json").read_text())
    weak, strong = (torch.tensor(golden["inputs"][name]) for name in ("weak", "strong"))
    method = uda(4)
    b = batch(torch.zeros(1, 4), weak, strong)
    outputs = method.student(b)
    targets = method.targets(b, outputs)
    assert targets[1].mean().item() == pytest.approx(golden["outputs"]["kept"])
    assert method.losses(b, outputs, targets)["unlabeled"].item() == pytest.approx(golden["outputs"]["loss"])


def test_labels_are_released_along_the_run(monkeypatch) -> None:
    x = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]]).log()
    b = batch(x, torch.zeros(2, 2), torch.zeros(2, 2))
    losses = {}
    for progress in (0.0, 0.5, 1.0):  # thresholds 0.5, 0.75 and 1
        monkeypatch.setattr(UDA, "progress", progress)
        losses[progress] = uda(annealing="linear").training_step(b, 0).item()
    nll = [-math.log(p) for p in (0.9, 0.7, 0.2)]
    assert losses[0.0] == pytest.approx(nll[2])
    assert losses[0.5] == pytest.approx((nll[1] + nll[2]) / 2)
    assert losses[1.0] == pytest.approx(sum(nll) / 3)


def test_bad_arguments() -> None:
    class Other(Criterion):
        pass

    with pytest.raises(UserError, match="annealing='cubic'"):
        uda(annealing="cubic")
    with pytest.raises(UserError, match="not with Other"):
        uda(annealing="log", criterion=Other)
