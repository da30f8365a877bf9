import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import ShrinkSimMatch, SimMatch
from zoo.core.errors import UserError
from zoo.policies import Alignment
from zoo.semi_supervised.shrinkmatch import AuxiliaryHead

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "shrink_simmatch.json").read_text())
SIMMATCH = json.loads((FOLDER / "simmatch.json").read_text())


class Parts(nn.Module):
    """The first C columns of an input are its logits; the features are all of them."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs, self.num_features = num_outputs, 12
        self.scale = nn.Parameter(torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * features[:, : self.num_outputs]

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


class Last(nn.Module):
    """What an auxiliary head says stands in the last columns."""

    def __init__(self, in_features: int, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs, self.scale = num_outputs, nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * features[:, -self.num_outputs :]


def built(cls: type = ShrinkSimMatch, **arguments: Any) -> Any:
    own = {"auxiliary": Last} if cls is ShrinkSimMatch else {}
    arguments = {"alignment": lambda _: Alignment(), "projection_dim": 5, "bank_size": 6, **own, **arguments}
    torch.manual_seed(0)
    made = cls(network=Parts, num_classes=4, **arguments)
    made.configure_model()
    return made


def batch() -> dict[str, dict[str, Tensor]]:
    labels = torch.arange(3)
    labeled = {"image": torch.randn(3, 12), "label": labels, "index": labels}
    return {"labeled": labeled, "unlabeled": {"weak": 2 * torch.randn(7, 12), "strong": torch.randn(7, 12)}}


def terms(made: Any, b: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    report = made.report
    made.report = lambda **values: kept.update(values) or report(**values)
    made.training_step(b, 0)
    made.report = report
    return kept


@pytest.mark.parametrize("threshold", [0.6, 0.7, 0.8])
def test_the_term_of_the_released_code(threshold, monkeypatch) -> None:
    wanted = GOLDEN["outputs"][str(threshold)]
    targets = torch.tensor(SIMMATCH["outputs"]["targets"])
    z = torch.tensor(GOLDEN["inputs"]["auxiliary_logits"], requires_grad=True)
    features = torch.cat([torch.zeros(5, 8), z], dim=1)
    made = built(threshold=threshold, unlabeled_weight=10.0)
    monkeypatch.setattr(made, "terms", lambda _: ({}, features, targets))
    shrunk = terms(made, {})["shrunk"]
    assert made.certain_ratio.value.item() == pytest.approx(wanted["certain"])
    assert shrunk.item() == pytest.approx(10 * wanted["certain"] * wanted["sum"] / 5, rel=1e-5)
    if wanted["certain"]:
        gradient = torch.autograd.grad(shrunk / (10 * wanted["certain"] / 5), z)[0]
        torch.testing.assert_close(gradient, torch.tensor(wanted["gradient"]), rtol=1e-4, atol=1e-6)


def test_it_is_simmatch_and_a_term() -> None:
    shrink, simmatch = built(threshold=0.8), built(SimMatch, threshold=0.8)
    for _ in range(3):
        b = batch()
        ours, theirs = terms(shrink, b), terms(simmatch, b)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)
    assert ours.keys() - theirs.keys() == {"shrunk"}
    assert ours["shrunk"] > 0
    torch.testing.assert_close(shrink.bank.features, simmatch.bank.features)


def test_all_certain_shrinks_nothing() -> None:
    made = built(threshold=0.1)
    assert terms(made, batch())["shrunk"].item() == 0
    assert made.certain_ratio.value == 1


def test_targets_carry_no_gradient() -> None:
    made, b = built(threshold=0.95), batch()
    b["unlabeled"]["weak"].requires_grad_()
    b["unlabeled"]["strong"].requires_grad_()
    made.certain_ratio.value = torch.tensor(0.5)
    gradients = torch.autograd.grad(
        terms(made, b)["shrunk"], [b["unlabeled"]["strong"], b["unlabeled"]["weak"]], allow_unused=True
    )
    assert gradients[0].any()
    assert gradients[1] is None or not gradients[1].any()


def test_the_auxiliary_head_is_that_of_the_code_for_imagenet() -> None:
    made = ShrinkSimMatch(network=Parts, num_classes=4, bank_size=6)
    made.configure_model()
    assert isinstance(made.auxiliary, AuxiliaryHead)
    assert [layer.negative_slope for layer in made.auxiliary.modules() if isinstance(layer, nn.LeakyReLU)] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"threshold": 0.0}, "threshold=0.0"), ({"ratio_momentum": 1.5}, "ratio_momentum=1.5")],
)
def test_mistakes(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        built(**arguments)


def test_two_classes_leave_nothing_to_remove() -> None:
    with pytest.raises(UserError, match="num_classes=2 must be at least 3"):
        ShrinkSimMatch(network=Parts, num_classes=2)
