import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zoo import AdaMatch
from zoo.core.errors import UserError
from zoo.policies import LabeledAlignment, RelativeThreshold


class Given(nn.Module):
    """Logits are the input itself, times one weight."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def normed(num_outputs: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, num_outputs))


def adamatch(network=Given, **arguments) -> AdaMatch:
    method = AdaMatch(network=network, num_classes=2, **arguments)
    method.configure_model()
    return method


def batch(features: int = 3) -> dict[str, dict[str, Tensor]]:
    x, u = torch.randn(2, 4, features), torch.randn(2, 6, features) + 1.0
    return {
        "labeled": {"image": x[0], "strong": x[1], "label": torch.tensor([0, 1, 0, 1])},
        "unlabeled": {"weak": u[0], "strong": u[1]},
    }


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def test_loss_by_hand() -> None:
    policy = partial(RelativeThreshold, threshold=0.9, alignment=partial(LabeledAlignment, momentum=0.0, length=1))
    b = {
        "labeled": {"image": logs([0.8, 0.2]), "strong": logs([0.5, 0.5]), "label": torch.tensor([0])},
        "unlabeled": {"weak": logs([0.6, 0.4], [0.4, 0.6]), "strong": logs([0.3, 0.7], [0.2, 0.8])},
    }
    # aligned from (0.5, 0.5) to (0.8, 0.2): 0.48 : 0.08 = 0.857 and 0.32 : 0.12 = 0.727; the threshold is 0.72
    loss = adamatch(policy=policy, ramp=0.0).training_step(b, 0)
    supervised = -(math.log(0.8) + math.log(0.5)) / 2
    assert loss.item() == pytest.approx(supervised - (math.log(0.3) + math.log(0.2)) / 2, rel=1e-5)


def test_unlabeled_weight_rises_along_a_cosine(monkeypatch) -> None:
    b, method = batch(2), adamatch(unlabeled_weight=2.0, ramp=0.5, interpolation=False)
    terms = []
    for progress in (0.0, 0.125, 0.25, 0.5, 1.0):
        monkeypatch.setattr(AdaMatch, "progress", progress)
        outputs = method.student(b)
        targets = torch.ones(6, dtype=torch.long), torch.ones(6)
        terms.append(method.losses(b, outputs, targets)["unlabeled"].item())
    assert [term / terms[-1] for term in terms] == pytest.approx([0.0, 0.5 - math.sqrt(0.5) / 2, 0.5, 1.0, 1.0])


def test_interpolation_lies_between_the_two_batch_statistics_and_leaves_no_trace() -> None:
    method, b = adamatch(normed), batch()
    known = torch.cat([b["labeled"]["image"], b["labeled"]["strong"]])
    joint = method.network(torch.cat([known, b["unlabeled"]["strong"], b["unlabeled"]["weak"]]))[:8]
    before = {k: v.clone() for k, v in method.network.state_dict().items()}
    mixed = method.interpolated(known, joint)
    assert all(torch.equal(v, method.network.state_dict()[k]) for k, v in before.items())
    alone = method.network(known)
    share = ((mixed - joint) / (alone - joint)).detach()
    assert ((share > -1e-4) & (share < 1 + 1e-4)).all()
    assert share.std() > 0.1  # one draw for every logit


def test_without_batch_norm_interpolation_has_no_effect() -> None:
    b = batch(2)
    losses = [adamatch(interpolation=value).training_step(b, 0) for value in (True, False)]
    torch.testing.assert_close(*losses)


def test_threshold_is_relative_to_the_weak_view_of_the_labels() -> None:
    method, b = adamatch(ramp=0.0, interpolation=False), batch(2)
    method.training_step(b, 0)
    expected = 0.9 * b["labeled"]["image"].softmax(1).amax(1).mean()
    torch.testing.assert_close(method.policy.thresholds(), expected.expand(2))


def test_bad_ramp() -> None:
    with pytest.raises(UserError, match="ramp=2"):
        adamatch(ramp=2)
