import pytest
import torch
from torch import Tensor, nn

from zoo import VAT, Supervised
from zoo.core.errors import UserError
from zoo.losses import entropy, virtual_adversarial_direction, virtual_adversarial_loss


class Small(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class Plain(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(12, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class At(VAT):
    progress = 1.0


def build(kind: type = At, network: type = Small, **arguments) -> VAT:
    torch.manual_seed(0)
    method = kind(network=network, num_classes=3, **arguments)
    method.configure_model()
    return method


def batch() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    labeled = {"image": torch.randn(6, 1, 3, 4), "label": torch.tensor([0, 1, 2, 0, 1, 2])}
    return {"labeled": labeled, "unlabeled": {"weak": torch.randn(10, 1, 3, 4)}}


def test_the_terms_are_those_of_the_losses() -> None:
    method, b = build(network=Plain, epsilon=0.8, unlabeled_weight=2.0, entropy_weight=0.5), batch()
    x = b["unlabeled"]["weak"]
    torch.manual_seed(5)
    loss = method.training_step(b, 0)
    torch.manual_seed(5)
    own = method.network(x)
    direction = virtual_adversarial_direction(method.network, x, own, torch.randn_like(x), method.xi)
    expected = nn.functional.cross_entropy(method.network(b["labeled"]["image"]), b["labeled"]["label"])
    expected = expected + 2 * virtual_adversarial_loss(method.network, x, own, direction, 0.8)
    torch.testing.assert_close(loss, expected + 0.5 * entropy(own).mean())


def test_only_labeled_samples_move_batch_norm_whose_batches_normalise() -> None:
    method, supervised, b = build(), build(Supervised), batch()
    for m in (method, supervised):
        m.training_step(b, 0)
    assert all(map(torch.equal, method.network.buffers(), supervised.network.buffers()))
    seen = []
    handle = method.network.layers[2].register_forward_hook(lambda module, given, output: seen.append(given[0]))
    method.training_step(b, 0)
    handle.remove()
    assert len(seen) == 4  # labeled, unlabeled, search, adversarial
    for normalised in seen:
        torch.testing.assert_close(normalised.mean(0), torch.zeros(8), atol=1e-5, rtol=0)


def test_the_search_leaves_no_gradient_in_the_network() -> None:
    method, b = build(), batch()
    loss = method.training_step(b, 0)
    assert all(p.grad is None for p in method.parameters())
    loss.backward()
    assert all(p.grad is not None for p in method.network.parameters())


def test_zero_distance_is_zero_and_the_term_grows_with_it() -> None:
    b, losses = batch(), []
    for epsilon in (0.0, 0.5, 2.0):
        method = build(epsilon=epsilon, unlabeled_weight=1.0, entropy_weight=0.0)
        losses.append(method.training_step(b, 0).item())
    assert losses[0] == pytest.approx(build(Supervised).training_step(b, 0).item(), rel=1e-6)
    assert losses[0] < losses[1] < losses[2]


def test_weights_zero_are_the_supervised_baseline_bit_for_bit() -> None:
    gradients = []
    for method in (build(unlabeled_weight=0.0, entropy_weight=0.0), build(Supervised)):
        loss = method.training_step(batch(), 0)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in method.network.parameters())])
    assert all(map(torch.equal, *gradients))


def test_the_smoothness_is_ramped_and_the_entropy_is_not() -> None:
    method = build(VAT, entropy_weight=0.0)  # outside a trainer: no progress yet
    torch.testing.assert_close(method.training_step(batch(), 0), build(Supervised).training_step(batch(), 0))
    assert build(VAT).training_step(batch(), 0) > build(Supervised).training_step(batch(), 0) + 0.01


def test_autocast_does_not_round_the_small_step_away() -> None:
    method, b, steps = build(network=Plain), batch(), []
    handle = method.network.register_forward_hook(lambda module, given, output: steps.append((given[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        method.training_step(b, 0)
    handle.remove()
    labeled, own, probe, _ = steps
    assert labeled[1].dtype == torch.bfloat16
    assert own[1].dtype == probe[1].dtype == torch.float32
    step = (probe[0] - own[0]).flatten(1)
    torch.testing.assert_close(step.norm(dim=1), torch.full((10,), method.xi), rtol=1e-3, atol=0)


def test_token_ids_and_a_joint_forward_pass_are_refused() -> None:
    b = batch()
    b["unlabeled"]["weak"] = torch.randint(9, (10, 12))
    with pytest.raises(UserError, match=r"At computes with pixels; inputs of torch\.int64"):
        build().training_step(b, 0)
    with pytest.raises(UserError, match="forward_pass must be 'split'"):
        build(forward_pass="joint")


@pytest.mark.parametrize("arguments", [{"epsilon": -1.0}, {"xi": 0.0}, {"iterations": 0}, {"entropy_weight": -0.1}])
def test_arguments_out_of_range_are_named(arguments) -> None:
    (name,) = arguments
    with pytest.raises(UserError, match=f"{name}="):
        build(**arguments)
