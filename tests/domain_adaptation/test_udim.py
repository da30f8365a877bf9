import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo import UDIM, SourceOnly
from zoo.core.errors import UserError
from zoo.core.heads import Cosine, Linear
from zoo.core.network import Network
from zoo.domain_adaptation.udim import perturb_pixels, perturb_style
from zoo.losses import gradient_size, gradient_variance_gap

PLAIN = partial(Network, backbone="lenet", in_channels=1)
NORMED = partial(Network, backbone="lenet", in_channels=1, arguments={"norm": True})
SGD = partial(torch.optim.SGD, lr=0.1)


def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(6, 1, 28, 28, generator=generator)
    return {"source": {"image": image, "label": torch.randint(3, (6,), generator=generator)}}


X = batch()["source"]["image"]


def method(cls: type = UDIM, network=PLAIN, progress: float = 1.0, optimizer=SGD, **arguments):
    torch.manual_seed(0)
    made = cls(network=network, num_classes=3, optimizer=optimizer, **arguments)
    made.configure_model()
    made._trainer = SimpleNamespace(global_step=progress * 100, estimated_stepping_batches=100, training=False)
    return made


def train(made, steps: int = 3):
    optimizer = made.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        made.training_step(batch(), 0).backward()
        optimizer.step()
    return made


@pytest.mark.parametrize("network", [PLAIN, NORMED])
@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.Adam, lr=1e-3)])
def test_without_radius_and_weight_it_is_the_baseline_bit_for_bit(network, optimizer) -> None:
    ours = train(method(network=network, optimizer=optimizer, rho=0.0, inconsistency_weight=0.0))
    baseline = train(method(SourceOnly, network=network, optimizer=optimizer))
    for name, value in baseline.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize("arguments", [{"inconsistency_weight": 0.0}, {"progress": 0.1}])
def test_weight_zero_and_warmup_are_sam_in_two_passes(arguments) -> None:
    ours, theirs = method(rho=0.3, **arguments).double(), method(SourceOnly).double()
    x, y = batch()["source"]["image"].double(), batch()["source"]["label"]
    ours.training_step({"source": {"image": x, "label": y}}, 0).backward()

    parameters = list(theirs.network.parameters())
    g = torch.autograd.grad(F.cross_entropy(theirs.network(x), y), parameters)
    norm = torch.cat([v.flatten() for v in g]).norm()
    with torch.no_grad():
        for p, v in zip(parameters, g, strict=True):
            p += 0.3 * v / norm
    F.cross_entropy(theirs.network(x), y).backward()
    for p, q in zip(ours.network.parameters(), parameters, strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-12)


def images_by_differences(made, x, y, rho: float, step_size: float, style: bool) -> torch.Tensor:
    """x̃ from the norm of the gradient itself, differentiated by autograd as it stands in the paper."""
    if style:
        mean, std = x.mean(dim=(2, 3), keepdim=True), (x.var(dim=(2, 3), keepdim=True) + 1e-5).sqrt()
        free = [mean.clone().requires_grad_(), std.clone().requires_grad_()]
        image = (x - mean) / std * free[1] + free[0]
    else:
        free = [x.clone().requires_grad_()]
        image = free[0]
    loss = F.cross_entropy(made.network(image), y)
    g = torch.autograd.grad(loss, list(made.network.parameters()), create_graph=True)
    value = loss + rho * torch.cat([v.flatten() for v in g]).norm()
    up = torch.autograd.grad(value, free)
    if style:
        return (x - mean) / std * (std + step_size * up[1]) + mean + step_size * up[0]
    return x + step_size * up[0] / up[0].flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("perturbation", ["pixels", "style"])
def test_step_is_the_sum_of_both_gradients(perturbation) -> None:
    ours = method(rho=0.5, step_size=2.0, inconsistency_weight=0.7, perturbation=perturbation).double()
    theirs, sam = copy.deepcopy(ours), method(rho=0.5, inconsistency_weight=0.0).double()
    x, y = batch()["source"]["image"].double(), batch()["source"]["label"]
    b = {"source": {"image": x, "label": y}}
    ours.training_step(b, 0).backward()
    sam.training_step(b, 0).backward()

    network = theirs.network
    perturbed = images_by_differences(theirs, x, y, 0.5, 2.0, perturbation == "style").detach()
    h, h_p = network.features(x), network.features(perturbed)
    z, z_p = network.logits(h), network.logits(h_p)
    (0.7 * (gradient_variance_gap((h, z), (h_p, z_p), y) + gradient_size(h_p, z_p, y))).backward()
    for p, q, r in zip(ours.parameters(), network.parameters(), sam.parameters(), strict=True):
        assert q.grad.abs().sum() > 0
        assert torch.allclose(p.grad, q.grad + r.grad, atol=1e-10)


@pytest.mark.parametrize("perturbation", [perturb_pixels, perturb_style])
def test_perturbation_climbs(perturbation) -> None:
    made = method(rho=0.0).double()
    x, y = batch()["source"]["image"].double(), batch()["source"]["label"]

    def loss(x):
        return F.cross_entropy(made.network(x), y), None

    for step_size in (1e-3, 1e-2):
        perturbed, _ = perturbation(x, step_size, loss)
        assert loss(perturbed)[0] > loss(x)[0]
        assert not perturbed.requires_grad


def test_pixels_move_each_image_by_the_same_length_whatever_is_beside_it() -> None:
    made = method()
    x, y = batch()["source"]["image"], batch()["source"]["label"]

    def perturbed(x, y):
        return perturb_pixels(x, 3.0, lambda x: (F.cross_entropy(made.network(x), y), None))[0]

    together = perturbed(x, y)
    assert torch.allclose((together - x).flatten(1).norm(dim=1), torch.full((6,), 3.0), atol=1e-4)
    assert torch.allclose(perturbed(x[:2], y[:2]), together[:2], atol=1e-4)


def test_style_keeps_what_is_normalised_away_and_flat_images_are_finite() -> None:
    made = method()
    x, y = batch()["source"]["image"], batch()["source"]["label"]
    perturbed, _ = perturb_style(x, 5.0, lambda x: (F.cross_entropy(made.network(x), y), None))

    def content(x):
        return (x - x.mean(dim=(2, 3), keepdim=True)) / x.std(dim=(2, 3), keepdim=True)

    assert (perturbed - x).abs().max() > 1e-4
    assert torch.allclose(content(perturbed), content(x), atol=1e-3)
    flat, _ = perturb_style(torch.ones_like(x), 5.0, lambda x: (F.cross_entropy(made.network(x), y), None))
    assert torch.isfinite(flat).all()


def test_nothing_moves_in_a_step_but_running_statistics_once() -> None:
    made, plain = method(network=NORMED), method(SourceOnly, network=NORMED)
    before = copy.deepcopy(dict(made.network.named_parameters()))
    made.training_step(batch(), 0).backward()
    plain.training_step(batch(), 0)
    for name, p in made.network.named_parameters():
        assert torch.equal(p, before[name]), name
    for name, value in plain.network.named_buffers():
        assert torch.equal(dict(made.network.named_buffers())[name], value), name


def test_a_step_of_length_0_has_no_gap_between_variances() -> None:
    made, seen = method(step_size=0.0), {}
    made.observe = lambda **values: seen.update(values)
    made.training_step(batch(), 0)
    assert seen["variance_gap"].item() < 1e-12  # one pass on twice the rows may round otherwise
    assert seen["gradient_size"] > 0
    made = method(step_size=5.0)
    made.observe = lambda **values: seen.update(values)
    made.training_step(batch(), 0)
    assert seen["variance_gap"] > 1e-9


def test_joint_and_split_differ_with_batch_norm_alone() -> None:
    for network, same in ((PLAIN, True), (NORMED, False)):
        joint, split = (method(network=network, forward_pass=way) for way in ("joint", "split"))
        losses = [made.training_step(batch(), 0) for made in (joint, split)]
        assert torch.allclose(*losses, atol=1e-6) == same


def observed(made) -> dict:
    seen: dict = {}
    made.observe = lambda **values: seen.update(values)
    made.training_step(batch(), 0)
    return seen


def test_gradients_are_those_of_a_head_behind_dropout_with_a_bias_or_without() -> None:
    class Nothing(nn.Module):
        def forward(self, x):
            return 0 * x

    y = batch()["source"]["label"]
    made = method()
    made.network.dropout = Nothing()
    z = made.network.head.bias.expand(6, 3)
    assert torch.allclose(observed(made)["gradient_size"], gradient_size(0 * made.network.features(X), z, y))
    made = method(network=partial(PLAIN, head=partial(Linear, bias=False)), step_size=0.0)
    h = made.network.features(X)
    wanted = gradient_size(h, made.network.head(h), y, bias=False)
    assert torch.allclose(observed(made)["gradient_size"], wanted)
    assert not torch.allclose(gradient_size(h, made.network.head(h), y), wanted)


@pytest.mark.parametrize("perturbation", ["pixels", "style"])
def test_two_ranks_are_one_on_the_joint_batch(perturbation, on_ranks) -> None:
    source = {k: v.double() if k == "image" else v for k, v in batch()["source"].items()}

    def run(rows: slice) -> list[torch.Tensor]:
        made = method(rho=0.5, step_size=0.5, perturbation=perturbation).double()
        made.training_step({"source": {k: v[rows] for k, v in source.items()}}, 0).backward()
        return [p.grad for p in made.parameters()]

    halves = on_ranks(lambda rank: run(slice(3 * rank, 3 * rank + 3)))
    for ours, theirs, joint in zip(*halves, run(slice(None)), strict=True):
        assert torch.allclose((ours + theirs) / 2, joint, atol=1e-10)


def test_networks_with_fused_attention_are_differentiated_twice() -> None:
    vit = partial(
        Network, backbone="vit_tiny_cifar", in_channels=1, image_size=28, arguments={"depth": 1, "embed_dim": 48}
    )
    made = method(network=vit)
    made.training_step(batch(), 0).backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_frozen_parameters_stay_out() -> None:
    made = method()
    made.network.backbone.requires_grad_(False)
    made.training_step(batch(), 0).backward()
    assert all(p.grad is None for p in made.network.backbone.parameters())
    assert made.network.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"perturbation": "pixel"}, "pixels"),
        ({"step_size": -1.0}, "step_size"),
        ({"inconsistency_weight": -1.0}, "inconsistency_weight"),
        ({"rho": -1.0}, "rho"),
        ({"warmup": 1.5}, "warmup"),
        ({"network": partial(PLAIN, head=Cosine)}, "Cosine"),
    ],
)
def test_bad_arguments(arguments, named) -> None:
    with pytest.raises(UserError, match=named):
        method(**arguments)


def test_what_is_no_image_is_refused() -> None:
    b = batch()
    b["source"]["image"] = b["source"]["image"].long()
    with pytest.raises(UserError, match="perturbs images"):
        method().training_step(b, 0)
