"""Loss terms that FixMatch does not have, by hand."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zoo import Dash, DebiasMatch, FlexMatch, FreeMatch, SoftMatch
from zoo.core.errors import UserError
from zoo.losses import fairness_loss
from zoo.policies import (
    DebiasedThreshold,
    DynamicThreshold,
    FlexibleThreshold,
    SelfAdaptiveThreshold,
    TruncatedGaussian,
)


class Given(nn.Module):
    """Logits are the input itself, times one weight."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def build(kind: type, **arguments):
    method = kind(network=Given, num_classes=2, **arguments)
    method.configure_model()
    return method


def batch(weak: list[float], strong: list[float]) -> dict[str, dict[str, Tensor]]:
    """Samples by their probability of class 0; one labeled sample of class 0 that is undecided."""
    return {
        "labeled": {"image": torch.zeros(1, 2), "label": torch.zeros(1, dtype=torch.long)},
        "unlabeled": {
            "weak": torch.tensor([[p, 1 - p] for p in weak]).log(),
            "strong": torch.tensor([[p, 1 - p] for p in strong]).log(),
            "index": torch.arange(len(weak)),
        },
    }


def unlabeled_loss(method, b) -> float:
    return method.training_step(b, 0).item() - math.log(2)


def test_flexmatch_over_three_steps() -> None:
    method = build(FlexMatch, policy=partial(FlexibleThreshold, threshold=0.9), unlabeled_weight=2.0)
    method.policy.prepare(torch.arange(2))
    b = batch([0.95, 0.4], [0.5, 0.5])
    for _ in range(2):  # thresholds 0 and 0, then (0.9, 0): class 1 was never confident
        assert unlabeled_loss(method, b) == pytest.approx(2.0 * math.log(2))
    b = batch([0.8, 0.05], [0.5, 0.5])  # below the full threshold of class 0; surely of class 1
    assert unlabeled_loss(method, b) == pytest.approx(math.log(2))
    # only now is sample 1 counted as class 1: β = (1, 1)
    b = batch([0.8, 0.2], [0.5, 0.5])
    assert unlabeled_loss(method, b) == pytest.approx(0.0, abs=1e-6)


def test_softmatch_weighs_every_sample() -> None:
    method = build(SoftMatch, policy=partial(TruncatedGaussian, momentum=0.0, alignment=None))
    loss = unlabeled_loss(method, batch([0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5]))
    weights = [1.0, 1.0, math.exp(-120 * 0.05**2), math.exp(-120 * 0.15**2)]
    assert loss == pytest.approx(math.log(2) * sum(weights) / 4, rel=1e-5)


def test_freematch_adds_the_fairness_of_the_kept_strong_views() -> None:
    method = build(FreeMatch, policy=partial(SelfAdaptiveThreshold, momentum=0.5), fairness_weight=0.3)
    b = batch([0.9, 0.9, 0.6, 0.4], [0.7, 0.6, 0.2, 0.4])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])  # as the policy's own test has it
    fairness = fairness_loss(b["unlabeled"]["strong"], weights, torch.tensor([0.6, 0.4]), torch.tensor([0.625, 0.375]))
    expected = -(math.log(0.7) + math.log(0.6) + math.log(0.6)) / 4 + 0.3 * fairness.item()
    assert unlabeled_loss(method, b) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="fairness_weight=-1"):
        build(FreeMatch, fairness_weight=-1)


@pytest.mark.parametrize(("average", "count"), [("kept", 2), ("all", 3)])
def test_dash_learns_labels_first_and_then_small_losses(average, count) -> None:
    policy = partial(DynamicThreshold, warmup_steps=1, scale=1.0, minimum=0.7)  # hard labels from the start
    method = build(Dash, policy=policy, average=average)
    b = batch([0.9, 0.2, 0.5], [0.5, 0.5, 0.5])
    b["unlabeled"]["weak"][2] = 0.0
    assert unlabeled_loss(method, b) == pytest.approx(0.0, abs=1e-6)
    method.policy.labeled_loss = torch.tensor(0.0)
    method.policy.minimum = 0.5  # confidence 0.607
    assert unlabeled_loss(method, b) == pytest.approx(2 * math.log(2) / count)
    with pytest.raises(UserError, match="average='some'"):
        build(Dash, average="some")


def test_debiasmatch_takes_the_margin_after_the_move() -> None:
    policy = partial(DebiasedThreshold, threshold=0.5, strength=1.0, momentum=0.0)
    method = build(DebiasMatch, policy=policy)
    b = batch([0.9, 0.9], [0.5, 0.5])
    # labels by the uniform marginal, then the marginal is (0.9, 0.1): the strong views are lifted to 0.9 of class 0
    assert unlabeled_loss(method, b) == pytest.approx(-math.log(0.9), rel=1e-5)
    # by (0.9, 0.1) the next ones are of class 1, and the marginal moves to (0.6, 0.4)
    assert unlabeled_loss(method, batch([0.6, 0.6], [0.5, 0.5])) == pytest.approx(-math.log(0.4), rel=1e-5)
