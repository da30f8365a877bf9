import math

import pytest
import torch

from zoo.losses import (
    class_balance_loss,
    classifier_discrepancy,
    domain_loss,
    entropy_weights,
    inverted_domain_loss,
    margin_disparity_loss,
    spectral_penalty,
)
from zoo.losses.mimicking import class_domain_loss, mutual_information, refined_log_probabilities


def test_weights_of_one_change_nothing_and_others_weigh() -> None:
    source, target = torch.randn(3).double(), torch.randn(5).double()
    assert torch.equal(domain_loss(source, target), domain_loss(source, target, torch.ones(3), torch.ones(5)))
    once = domain_loss(source[:1], target)
    assert domain_loss(source, target, torch.tensor([3.0, 0, 0]), torch.ones(5)).item() == pytest.approx(once.item())


def test_inverted_label_pulls_where_the_reversed_loss_does_not() -> None:
    sure = torch.tensor([-20.0], requires_grad=True)  # the discriminator is sure of a target
    (inverted,) = torch.autograd.grad(inverted_domain_loss(sure), sure)
    (reverse,) = torch.autograd.grad(-domain_loss(torch.zeros(1), sure), sure)
    assert inverted.item() == pytest.approx(-1, abs=1e-6)
    assert abs(reverse.item()) < 1e-6
    assert inverted_domain_loss(torch.zeros(3)).item() == pytest.approx(math.log(2))


def test_entropy_weights_count_the_sure_twice() -> None:
    sure, unsure = torch.tensor([[100.0, 0, 0]]), torch.zeros(1, 3)
    (a,), (b,) = entropy_weights(sure, unsure)
    assert (a / b).item() == pytest.approx(2 / (1 + 1 / 3))
    assert (a + b).item() == pytest.approx(2)
    many = entropy_weights(sure.repeat(6, 1), unsure)  # sizes do not matter
    assert torch.allclose(many[0], a.expand(6))
    assert torch.allclose(many[1], b)


def test_margin_disparity_by_hand_and_far_out() -> None:
    main, against = torch.tensor([[2.0, 0.0]]), torch.log(torch.tensor([[0.8, 0.2]]))
    loss = margin_disparity_loss(main, against, main, against, margin=3.0)
    assert loss.item() == pytest.approx(-3 * math.log(0.8) - math.log(0.2))
    far = torch.tensor([[500.0, 0.0]], requires_grad=True)  # p rounds to 1: still a gradient
    loss = margin_disparity_loss(main, against, main, far)
    (gradient,) = torch.autograd.grad(loss, far)
    assert torch.allclose(gradient, torch.tensor([[1.0, -1.0]]))
    assert margin_disparity_loss(main.bfloat16(), against.bfloat16(), main, far.bfloat16()).dtype == torch.float32


def test_spectral_penalty_is_of_the_largest_singular_values() -> None:
    u, _ = torch.linalg.qr(torch.randn(6, 3).double())
    v, _ = torch.linalg.qr(torch.randn(4, 3).double())
    features = u @ torch.diag(torch.tensor([5.0, 3, 1]).double()) @ v.T
    assert spectral_penalty(features).item() == pytest.approx(25)
    assert spectral_penalty(features, 2).item() == pytest.approx(34)
    assert spectral_penalty(features, 9).item() == pytest.approx(features.square().sum().item())
    assert spectral_penalty(features.bfloat16()).dtype == torch.float32


def test_discrepancy_and_balance_limits() -> None:
    ends = torch.tensor([[100.0, 0, 0, 0]]), torch.tensor([[0, 100.0, 0, 0]])
    assert classifier_discrepancy(*ends).item() == pytest.approx(2 / 4)
    assert classifier_discrepancy(ends[0], ends[0]).item() == 0
    assert class_balance_loss(torch.zeros(3, 4)).item() == pytest.approx(math.log(4), abs=1e-5)
    assert class_balance_loss(torch.eye(4) * 100).item() == pytest.approx(math.log(4), abs=1e-5)
    assert class_balance_loss(ends[0]).item() > 9


def test_refinement_is_bayes_rule() -> None:
    logits, domains = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    rho = refined_log_probabilities(logits, domains).exp()
    by_hand = logits.softmax(1) * (1 - torch.sigmoid(domains))
    assert torch.allclose(rho, by_hand / by_hand.sum(1, keepdim=True))
    assert torch.allclose(rho.sum(1), torch.ones(5).double())
    same = refined_log_probabilities(logits, domains[:, :1].expand(-1, 3)).exp()  # all discriminators alike
    assert torch.allclose(same, logits.softmax(1))
    far = refined_log_probabilities(torch.tensor([[500.0, 0]]), torch.tensor([[500.0, -500]]))
    assert torch.isfinite(far).all()


def test_refinement_leaves_the_discriminators_alone() -> None:
    domains = torch.randn(4, 3, requires_grad=True)
    logits = torch.randn(4, 3, requires_grad=True)
    mutual_information(refined_log_probabilities(logits, domains)).backward()
    assert domains.grad is None
    assert logits.grad.abs().sum() > 0


def test_mutual_information_range_and_value() -> None:
    certain = torch.eye(4).mul(1000).log_softmax(1)
    assert mutual_information(certain).item() == pytest.approx(math.log(4))
    assert mutual_information(certain[:1].expand(5, -1)).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information(torch.zeros(5, 4).log_softmax(1)).item() == pytest.approx(0, abs=1e-6)
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).double()
    mean = p.mean(0)
    by_hand = -(mean * mean.log()).sum() + (p * p.log()).sum(1).mean()
    assert mutual_information(p.log()).item() == pytest.approx(by_hand.item())


def test_class_domain_loss_masks_every_sample_by_its_own_label() -> None:
    source, target, shares = torch.randn(4, 3).double(), torch.randn(2, 3).double(), torch.rand(2, 3).double()
    labels = torch.tensor([2, 0, 0, 1])
    by_hand = 0.0
    for k in range(3):
        for i in range(4):
            by_hand += float(labels[i] == k) * -math.log(torch.sigmoid(source[i, k])) / 4
        for j in range(2):
            by_hand += float(shares[j, k]) * -math.log(1 - torch.sigmoid(target[j, k])) / 2
    assert class_domain_loss(source, target, labels, shares).item() == pytest.approx(by_hand / 6)
