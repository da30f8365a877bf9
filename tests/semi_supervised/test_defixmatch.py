from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo import DeFixMatch, FixMatch
from zoo.policies import MovingAlignment, Threshold


class Small(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.layers(x)


def build(kind: type = DeFixMatch, **arguments) -> FixMatch:
    torch.manual_seed(0)
    arguments = {"policy": partial(Threshold, threshold=0.6), **arguments}
    method = kind(network=Small, num_classes=3, **arguments)
    method.configure_model()
    return method


def batch() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    labeled = {"image": torch.randn(6, 4), "strong": torch.randn(6, 4), "label": torch.tensor([0, 1, 2, 0, 1, 2])}
    return {"labeled": labeled, "unlabeled": {"weak": torch.randn(9, 4), "strong": torch.randn(9, 4)}}


def risk(method: FixMatch, weak: Tensor, strong: Tensor) -> Tensor:
    p, z = method.network(weak).softmax(1), method.network(strong)
    kept = [cross_entropy(z[i : i + 1], p[i : i + 1].argmax(1)) for i in range(len(p)) if p[i].max() >= 0.6]
    assert 0 < len(kept) < len(p)
    return sum(kept) / len(p)


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_loss_is_the_risk_on_unlabeled_less_that_on_labeled_samples(forward_pass) -> None:
    method, b = build(unlabeled_weight=0.7, forward_pass=forward_pass), batch()
    x, u = b["labeled"], b["unlabeled"]
    supervised = sum(cross_entropy(method.network(x[view]), x["label"]) for view in ("image", "strong")) / 2
    expected = supervised + 0.7 * (risk(method, u["weak"], u["strong"]) - risk(method, x["image"], x["strong"]))
    torch.testing.assert_close(method.training_step(b, 0), expected)


def test_the_terms_cancel_where_labeled_and_unlabeled_samples_are_the_same() -> None:
    b = batch()
    b["unlabeled"] = {"weak": b["labeled"]["image"], "strong": b["labeled"]["strong"]}
    gradients = []
    for weight in (0.0, 1.0):
        method = build(unlabeled_weight=weight)
        loss = method.training_step(b, 0)
        gradients.append([loss, *torch.autograd.grad(loss, list(method.network.parameters()))])
    for without, debiased in zip(*gradients, strict=True):
        torch.testing.assert_close(debiased, without)


def test_labels_are_not_used_for_the_debiasing_term_and_carry_no_gradient() -> None:
    method, b = build(unlabeled_weight=1.0), batch()
    targets, weights = method.pseudo_labeled(b, method.network(b["labeled"]["image"]))
    b["labeled"]["label"] = b["labeled"]["label"].flip(0)
    assert torch.equal(targets, method.pseudo_labeled(b, method.network(b["labeled"]["image"]))[0])
    assert not targets.requires_grad
    assert not weights.requires_grad


def test_labeled_samples_do_not_move_the_policy() -> None:
    policy = partial(Threshold, threshold=0.6, alignment=partial(MovingAlignment, momentum=0.5))
    method, fixmatch, b = build(policy=policy), build(FixMatch, policy=policy), batch()
    for m in (method, fixmatch):
        m.training_step(b, 0)
        assert m.policy.training
    assert torch.equal(method.policy.alignment.mean, fixmatch.policy.alignment.mean)
    assert not torch.equal(method.policy.alignment.mean, method.policy.alignment.prior)
