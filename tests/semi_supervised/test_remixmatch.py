from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from zoo import ReMixMatch, Supervised
from zoo.core.errors import UserError
from zoo.losses import mix, mixing_shares, quarter_turns, sharpen
from zoo.policies import Alignment, MovingAlignment


class Small(nn.Module):
    num_features = 6

    def __init__(self, num_outputs: int, norm: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(9, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh())
        self.head = nn.Linear(6, num_outputs)

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x.flatten(1))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


class Norm(Small):
    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs, norm=True)


class At(ReMixMatch):
    progress = 1.0


def unaligned(num_classes: int) -> Alignment:
    return Alignment()


def build(kind: type = At, network: type = Small, **arguments) -> ReMixMatch:
    torch.manual_seed(0)
    if kind is not Supervised:
        arguments = {"num_strong": 2, "alignment": unaligned, **arguments}
    method = kind(network=network, num_classes=3, **arguments)
    method.configure_model()
    return method


def batch() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    unlabeled = {view: torch.randn(6, 1, 3, 3) for view in ("weak", "strong", "strong_2")}
    return {"labeled": {"strong": torch.randn(3, 1, 3, 3), "label": torch.tensor([0, 2, 1])}, "unlabeled": unlabeled}


def test_loss_is_the_sum_of_its_four_terms() -> None:
    method, b = build(unlabeled_weight=2.0, anchor_weight=0.3, rotation_weight=0.7), batch()
    u, network = b["unlabeled"], method.network
    torch.manual_seed(4)
    loss = method.training_step(b, 0)
    torch.manual_seed(4)
    lam, permutation = mixing_shares(21, 0.75), torch.randperm(21)
    guesses = sharpen(network(u["weak"]).softmax(1), 0.5).detach()
    x = torch.cat([b["labeled"]["strong"], u["weak"], u["strong"], u["strong_2"]])
    targets = torch.cat([one_hot(b["labeled"]["label"], 3).float(), guesses, guesses, guesses])
    x, targets = mix(x, targets, lam, permutation)
    z = network(x)
    expected = cross_entropy(z[:3], targets[:3]) + 2 * cross_entropy(z[3:], targets[3:])
    expected = expected + 0.3 * cross_entropy(network(u["strong"]), guesses)
    turned, turns = quarter_turns(u["strong"])
    rotation = cross_entropy(method.rotation_head(network.features(turned)), turns)
    torch.testing.assert_close(loss, expected + 0.7 * rotation)


def test_the_weak_view_gives_the_guesses_and_they_carry_no_gradient() -> None:
    method, b = build(), batch()
    guesses = method.guess(b)
    assert not guesses.requires_grad
    for view in ("strong", "strong_2"):
        b["unlabeled"][view] = torch.randn(6, 1, 3, 3)
    assert torch.equal(guesses, method.guess(b))


def test_guesses_are_aligned_with_the_labels_own_frequencies() -> None:
    method, b = build(alignment=partial(MovingAlignment, momentum=0.0)), batch()
    labels = SimpleNamespace(samples=SimpleNamespace(labels=torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])))
    method.prepare_for(SimpleNamespace(roles={"labeled": labels}))
    torch.testing.assert_close(method.alignment.prior, torch.tensor([0.3, 0.4, 0.3]))
    p = method.network(b["unlabeled"]["weak"]).softmax(1)
    aligned = p * torch.tensor([0.3, 0.4, 0.3]) / p.mean(0)
    aligned = aligned / aligned.sum(1, keepdim=True)
    torch.testing.assert_close(method.guess(b), sharpen(aligned, 0.5).detach())


def test_the_papers_alignment_remembers_128_batches() -> None:
    method = ReMixMatch(network=Small, num_classes=3)
    method.configure_model()
    assert method.alignment.queue.shape == (128, 3)
    assert method.unlabeled_views == ("weak", "strong", *(f"strong_{k}" for k in range(2, 9)))
    assert ReMixMatch.unlabeled_views == ("weak",)  # one method's views are not another's


def test_weights_zero_and_no_mixing_are_the_supervised_baseline() -> None:
    b, gradients = batch(), []
    zero = {"unlabeled_weight": 0.0, "anchor_weight": 0.0, "rotation_weight": 0.0, "alpha": 0.0}
    for method in (build(**zero), build(Supervised)):
        b["labeled"]["image"] = b["labeled"]["strong"]
        loss = method.training_step(b, 0)
        gradients.append([loss, *torch.autograd.grad(loss, list(method.network.parameters()))])
    for ours, supervised in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, supervised)


def test_the_ramp_grows_what_is_guessed_and_not_the_rotation() -> None:
    losses = []
    for kind, weights in ((ReMixMatch, {}), (At, {"unlabeled_weight": 0.0, "anchor_weight": 0.0})):
        method = build(kind, **weights)  # the first outside a trainer: no progress yet
        torch.manual_seed(4)
        losses.append(method.training_step(batch(), 0))
    torch.testing.assert_close(*losses)
    torch.manual_seed(4)
    without = build(ReMixMatch, rotation_weight=0.0).training_step(batch(), 0)
    assert losses[0] > without + 0.1


def test_batch_norm_is_moved_once_by_the_mixed_batch() -> None:
    method, b = build(network=Norm), batch()
    norm, seen = method.network.backbone[1], []
    method.network.backbone[0].register_forward_hook(lambda module, given, output: seen.append(output))
    method.training_step(b, 0)
    assert [len(x) for x in seen] == [6, 21, 12]
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[1].mean(0))


def test_no_rotation_no_head_and_no_need_for_squares() -> None:
    method, b = build(rotation_weight=0.0), batch()
    assert not hasattr(method, "rotation_head")
    for role, views in b.items():
        b[role] = {view: x.reshape(-1, 1, 1, 9) if x.is_floating_point() else x for view, x in views.items()}
    method.training_step(b, 0).backward()
    with pytest.raises(UserError, match="not square"):
        build().training_step(b, 0)


def test_token_ids_are_refused() -> None:
    b = batch()
    b["unlabeled"]["strong_2"] = torch.randint(9, (6, 9))
    with pytest.raises(UserError, match="At computes with pixels"):
        build().training_step(b, 0)


@pytest.mark.parametrize(
    "arguments", [{"num_strong": 0}, {"temperature": 0.0}, {"alpha": -0.5}, {"anchor_weight": -1.0}]
)
def test_arguments_out_of_range_are_named(arguments) -> None:
    (name,) = arguments
    with pytest.raises(UserError, match=f"{name}="):
        build(**arguments)


def test_a_joint_forward_pass_that_nothing_would_heed_is_refused() -> None:
    with pytest.raises(UserError, match="forward_pass must be 'split'"):
        build(forward_pass="joint")
