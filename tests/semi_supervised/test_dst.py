import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo import DST, Supervised
from zoo.core.errors import UserError
from zoo.losses import worst_case_loss
from zoo.policies import Threshold


class Small(nn.Module):
    num_features = 5

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 5), nn.Linear(5, num_outputs)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.backbone(x))

    def logits(self, features: Tensor) -> Tensor:
        return 3 * self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


class Reversed(DST):
    reversal = 0.3


def build(kind: type = Reversed, **arguments) -> DST:
    torch.manual_seed(0)
    if kind is not Supervised:
        policy = partial(Threshold, threshold=0.6)
        arguments = {"head_width": 7, "head_dropout": 0.0, "policy": policy, **arguments}
    method = kind(network=Small, num_classes=3, **arguments)
    method.configure_model()
    return method


def batch() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    labeled = {"image": torch.randn(6, 4), "strong": torch.randn(6, 4), "label": torch.tensor([0, 1, 2, 0, 1, 2])}
    return {"labeled": labeled, "unlabeled": {"weak": torch.randn(9, 4), "strong": torch.randn(9, 4)}}


def gradients(method: DST, **weights: float) -> dict[str, Tensor]:
    """By module, with all weights but the given ones zero and the supervised gradient taken off."""
    names = ("unlabeled_weight", "strong_weight", "worst_weight")
    result: dict[str, Tensor] = {}
    for sign, values in ((1, weights), (-1, {})):
        for name in names:
            setattr(method, name, values.get(name, 0.0))
        method.zero_grad()
        method.training_step(batch(), 0).backward()
        for part in ("network.backbone", "network.head", "pseudo_head", "worst_head"):
            gradient = torch.cat([p.grad.flatten() for p in method.get_submodule(part).parameters()])
            result[part] = result.get(part, 0) + sign * gradient
    return result


def zero(x: Tensor) -> bool:
    return bool(x.abs().max() < 1e-7)


def test_loss_is_the_sum_of_its_four_terms() -> None:
    method, b = build(unlabeled_weight=0.5, strong_weight=0.2, worst_weight=0.7, labeled_weight=3.0), batch()
    x, u, network = b["labeled"], b["unlabeled"], method.network
    z, own = network(x["image"]), network(u["weak"])
    confidence, targets = own.softmax(1).max(1)
    kept = (confidence >= 0.6).float()
    assert 0 < kept.sum() < 9
    pseudo = cross_entropy(method.pseudo_head(network.features(u["strong"])), targets, reduction="none")
    worst = [method.worst_head(network.features(view)) for view in (x["image"], u["weak"])]
    expected = cross_entropy(z, x["label"]) + 0.2 * cross_entropy(network(x["strong"]), x["label"])
    expected = expected + 0.5 * (kept * pseudo).mean()
    expected = expected + 0.7 * worst_case_loss(worst[0], z.argmax(1), worst[1], targets, 3.0)
    torch.testing.assert_close(method.training_step(b, 0), expected)


def test_the_worst_heads_gradient_reaches_the_features_reversed_and_never_the_main_head() -> None:
    reached = gradients(build(), worst_weight=1.0)
    assert zero(reached["network.head"])
    assert zero(reached["pseudo_head"])
    assert not zero(reached["worst_head"])

    class Forward(DST):
        reversal = -1.0  # no reversal at all

    unreversed = gradients(build(Forward), worst_weight=1.0)
    torch.testing.assert_close(reached["worst_head"], unreversed["worst_head"])
    torch.testing.assert_close(reached["network.backbone"], -0.3 * unreversed["network.backbone"])


def test_pseudo_labels_teach_the_pseudo_head_and_the_features_but_not_the_main_head() -> None:
    reached = gradients(build(), unlabeled_weight=1.0)
    assert zero(reached["network.head"])
    assert zero(reached["worst_head"])
    assert not zero(reached["pseudo_head"])
    assert not zero(reached["network.backbone"])


def test_weights_zero_are_the_supervised_baseline() -> None:
    results = []
    for method in (build(unlabeled_weight=0.0, strong_weight=0.0, worst_weight=0.0), build(Supervised)):
        loss = method.training_step(batch(), 0)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in method.network.parameters())])
    for ours, supervised in zip(*results, strict=True):
        torch.testing.assert_close(ours, supervised)


def test_the_order_of_unlabeled_samples_does_not_matter() -> None:
    method, b = build(), batch()
    loss = method.training_step(b, 0)
    order = torch.randperm(9)
    b["unlabeled"] = {view: x[order] for view, x in b["unlabeled"].items()}
    torch.testing.assert_close(method.training_step(b, 0), loss)


def test_the_reversal_grows_towards_its_limit() -> None:
    method = build(DST, max_reversal=0.1, ramp_steps=50)
    assert method.reversal == 0.0
    method._trainer = type("Trainer", (), {"global_step": 50})()
    assert method.reversal == pytest.approx(0.1 * (2 / (1 + math.exp(-1)) - 1))
    method._trainer = type("Trainer", (), {"global_step": 10**6})()
    assert method.reversal == pytest.approx(0.1)


def test_the_heads_are_not_evaluated_and_do_not_change_the_network() -> None:
    method, supervised = build(), build(Supervised)
    x = torch.randn(3, 4)
    assert torch.equal(method(x), supervised(x))


@pytest.mark.parametrize("arguments", [{"worst_weight": -1.0}, {"ramp_steps": 0}, {"head_dropout": 1.0}])
def test_arguments_out_of_range_are_named(arguments) -> None:
    (name,) = arguments
    with pytest.raises(UserError, match=f"{name}="):
        build(**arguments)
