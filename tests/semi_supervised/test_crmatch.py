from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from zoo import CRMatch, FixMatch
from zoo.core.errors import UserError
from zoo.losses import quarter_turns
from zoo.policies import Threshold


class Small(nn.Module):
    num_features = 6

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(9, 6), nn.Linear(6, num_outputs)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.backbone(x.flatten(1)))

    def logits(self, features: Tensor) -> Tensor:
        return 3 * self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


def build(kind: type = CRMatch, **arguments) -> FixMatch:
    torch.manual_seed(0)
    method = kind(network=Small, num_classes=3, policy=partial(Threshold, threshold=0.6), **arguments)
    method.configure_model()
    return method


def batch() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    unlabeled = {view: torch.randn(8, 1, 3, 3) for view in ("weak", "strong")}
    return {"labeled": {"image": torch.randn(3, 1, 3, 3), "label": torch.tensor([0, 2, 1])}, "unlabeled": unlabeled}


def test_loss_is_fixmatchs_and_two_more_terms() -> None:
    method, b = build(distance_weight=0.4, rotation_weight=0.3, unlabeled_weight=0.9), batch()
    weak, strong = (b["unlabeled"][view] for view in ("weak", "strong"))
    kept = method.network(weak).softmax(1).max(1).values >= 0.6
    assert 0 < kept.sum() < 8
    maps = [method.distance_map(method.network.features(view)) for view in (weak, strong)]
    distance = (kept * cosine_similarity(*maps).clamp_min(0)).mean()
    assert distance > 0
    turned, turns = quarter_turns(weak)
    rotation = cross_entropy(method.rotation_head(method.network.features(turned)), turns)
    fixmatch = build(FixMatch, unlabeled_weight=0.9).training_step(b, 0)
    torch.testing.assert_close(method.training_step(b, 0), fixmatch + 0.4 * distance + 0.3 * rotation)


def test_weights_zero_are_fixmatch() -> None:
    gradients = []
    for method in (build(distance_weight=0.0, rotation_weight=0.0), build(FixMatch)):
        loss = method.training_step(batch(), 0)
        gradients.append([loss, *torch.autograd.grad(loss, list(method.network.parameters()))])
    for ours, fixmatch in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, fixmatch)


def test_the_extra_terms_do_not_touch_the_classifier() -> None:
    heads = []
    for weight in (0.0, 1.0):
        method = build(distance_weight=weight, rotation_weight=weight)
        method.training_step(batch(), 0).backward()
        heads.append([p.grad for p in method.network.head.parameters()])
    for without, with_terms in zip(*heads, strict=True):
        torch.testing.assert_close(with_terms, without)


def test_token_ids_and_negative_weights_are_refused() -> None:
    b = batch()
    b["unlabeled"]["weak"] = torch.randint(9, (8, 9))
    with pytest.raises(UserError, match="CRMatch computes with pixels"):
        build().training_step(b, 0)
    with pytest.raises(UserError, match=r"distance_weight=-1\.0"):
        build(distance_weight=-1.0)


def test_without_rotations_inputs_need_not_be_square_and_no_head_waits_for_a_gradient() -> None:
    b = batch()
    for role in b.values():
        role.update({name: x.reshape(-1, 1, 1, 9) for name, x in role.items() if x.ndim == 4})
    with pytest.raises(UserError, match="not square"):
        build().training_step(b, 0)
    method = build(rotation_weight=0.0)
    loss = method.training_step(b, 0)
    loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    torch.testing.assert_close(loss, build(rotation_weight=0.0).training_step(batch(), 0))
