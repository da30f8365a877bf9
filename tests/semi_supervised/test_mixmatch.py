import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from zoo import MixMatch, Supervised
from zoo.core.errors import UserError
from zoo.losses import mix, mixing_shares, sharpen, squared_error


class Small(nn.Module):
    def __init__(self, num_outputs: int, norm: bool = False) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(12, 8), middle, nn.Tanh(), nn.Linear(8, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class Norm(Small):
    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs, norm=True)


class At(MixMatch):
    progress = 1.0


def build(kind: type = At, network: type = Small, **arguments) -> MixMatch:
    torch.manual_seed(0)
    method = kind(network=network, num_classes=3, **arguments)
    method.configure_model()
    return method


def batch() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    unlabeled = {"weak": torch.randn(5, 1, 3, 4), "weak_2": torch.randn(5, 1, 3, 4)}
    return {"labeled": {"image": torch.randn(3, 1, 3, 4), "label": torch.tensor([0, 2, 1])}, "unlabeled": unlabeled}


def test_loss_is_algorithm_1() -> None:
    method, b = build(unlabeled_weight=5.0), batch()
    views = list(b["unlabeled"].values())
    torch.manual_seed(4)
    loss = method.training_step(b, 0)
    torch.manual_seed(4)
    lam, permutation = mixing_shares(13, 0.75), torch.randperm(13)
    guesses = sharpen((method.network(views[0]).softmax(1) + method.network(views[1]).softmax(1)) / 2, 0.5).detach()
    x = torch.cat([b["labeled"]["image"], *views])
    targets = torch.cat([one_hot(b["labeled"]["label"], 3).float(), guesses, guesses])
    x, targets = mix(x, targets, lam, permutation)
    z = method.network(x)
    torch.testing.assert_close(loss, cross_entropy(z[:3], targets[:3]) + 5 * squared_error(z[3:], targets[3:]))


def test_weight_zero_is_the_supervised_loss_of_the_mixed_labeled_samples() -> None:
    method, b = build(unlabeled_weight=0.0), batch()
    seen = []
    method.criterion.register_forward_hook(lambda module, given, output: seen.append((given[1], output)))
    loss = method.training_step(b, 0)
    targets, supervised = seen[0]
    torch.testing.assert_close(loss, supervised)
    assert (targets.gather(1, b["labeled"]["label"][:, None]) >= 0.5).all()  # λ' ≥ 1/2: they stay mostly themselves
    assert not torch.equal(targets, one_hot(b["labeled"]["label"], 3).float())


def test_alpha_zero_mixes_nothing() -> None:
    b, gradients = batch(), []
    for method in (build(alpha=0.0, unlabeled_weight=0.0), build(Supervised)):
        loss = method.training_step(b, 0)
        gradients.append([loss, *torch.autograd.grad(loss, list(method.network.parameters()))])
    for mixed, supervised in zip(*gradients, strict=True):
        torch.testing.assert_close(mixed, supervised)


def test_guesses_carry_no_gradient_and_do_not_depend_on_the_order_of_views() -> None:
    method, b = build(), batch()
    views = list(b["unlabeled"].values())
    guesses = method.guess(views)
    assert not guesses.requires_grad
    torch.testing.assert_close(guesses, method.guess(views[::-1]))
    torch.testing.assert_close(guesses.sum(1), torch.ones(5))


def test_without_mixing_the_order_of_unlabeled_samples_does_not_matter() -> None:
    method, b = build(alpha=0.0), batch()
    loss = method.training_step(b, 0)
    order = torch.randperm(5)
    b["unlabeled"] = {view: x[order] for view, x in b["unlabeled"].items()}
    torch.testing.assert_close(method.training_step(b, 0), loss)


def test_batch_norm_is_moved_once_by_the_mixed_batch() -> None:
    method, b = build(network=Norm), batch()
    norm, seen = method.network.layers[1], []
    method.network.layers[0].register_forward_hook(lambda module, given, output: seen.append(output))
    method.training_step(b, 0)
    guessing, mixed = seen
    assert (len(guessing), len(mixed)) == (10, 13)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * mixed.mean(0))


def test_the_unlabeled_term_is_ramped() -> None:
    torch.manual_seed(4)
    first = build(MixMatch).training_step(batch(), 0)  # outside a trainer: no progress yet
    torch.manual_seed(4)
    torch.testing.assert_close(first, build(unlabeled_weight=0.0).training_step(batch(), 0))


def test_token_ids_are_refused() -> None:
    b = batch()
    b["labeled"]["image"] = torch.randint(9, (3, 12))
    with pytest.raises(UserError, match="At computes with pixels"):
        build().training_step(b, 0)


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"alpha": -0.5}, {"unlabeled_weight": -1.0}])
def test_arguments_out_of_range_are_named(arguments) -> None:
    (name,) = arguments
    with pytest.raises(UserError, match=f"{name}="):
        build(**arguments)


def test_a_joint_forward_pass_that_nothing_would_heed_is_refused() -> None:
    with pytest.raises(UserError, match="forward_pass must be 'split'"):
        build(forward_pass="joint")
