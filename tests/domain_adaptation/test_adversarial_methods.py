"""CDAN, BSP and MDD: what stands behind the reversed gradient."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from zoo import BSP, CDAN, DANN, MDD, SourceOnly
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation import adversarial, mdd
from zoo.domain_adaptation.discriminators import (
    ClassDiscriminators,
    DomainDiscriminator,
    FeaturesAlone,
    MultilinearMap,
    Parallel,
)
from zoo.losses import entropy_weights, spectral_penalty

NETWORK = partial(Network, backbone="lenet", in_channels=1)
SGD = partial(torch.optim.SGD, lr=0.1)
SMALL = partial(DomainDiscriminator, hidden=8, layers=1, norm=False)
EASY = {"ramp_steps": 0}  # a constant λ needs no trainer


def batch(source: int = 6, target: int = 4) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "source": {
            "image": torch.randn(source, 1, 28, 28, generator=generator),
            "label": torch.randint(3, (source,), generator=generator),
        },
        "target": {"image": torch.randn(target, 1, 28, 28, generator=generator) + 1},
    }


def method(cls: type, **arguments):
    if cls not in (MDD, SourceOnly):
        arguments = {"discriminator": SMALL, **arguments}
    torch.manual_seed(0)
    made = cls(network=NETWORK, num_classes=3, optimizer=SGD, **arguments)
    made.configure_model()
    return made


def gradients(made, part: str) -> list:
    made.zero_grad()
    made.training_step(batch(), 0).backward()
    return [p.grad.clone() for p in made.get_submodule(part).parameters()]


def test_conditional_method_on_the_features_alone_is_dann_and_penalty_of_weight_zero_is_the_base() -> None:
    plain = gradients(method(DANN, **EASY), "network")
    for made in (
        method(CDAN, map=FeaturesAlone, **EASY),
        method(BSP, spectral_weight=0.0, **EASY),
    ):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(made, "network"), strict=True))
    joined = gradients(method(CDAN, **EASY), "network")
    penalised = gradients(method(BSP, spectral_weight=0.0, map=MultilinearMap, **EASY), "network")
    assert all(torch.equal(a, b) for a, b in zip(joined, penalised, strict=True))
    assert not torch.allclose(joined[0], plain[0])


def test_penalty_adds_its_own_gradient() -> None:
    base, made = method(BSP, spectral_weight=0.0, **EASY), method(BSP, spectral_weight=0.5, **EASY)
    features = base.both(*(batch()[role]["image"] for role in ("source", "target")))
    penalty = 0.5 * sum(map(spectral_penalty, features))
    extra = torch.autograd.grad(penalty, list(base.network.backbone.parameters()))
    for a, b, e in zip(gradients(made, "network.backbone"), gradients(base, "network.backbone"), extra, strict=True):
        assert torch.allclose(a, b + e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


@pytest.mark.parametrize("cls", [CDAN, BSP, MDD])
def test_weight_zero_is_source_only(cls) -> None:
    arguments = {"spectral_weight": 0.0} if cls is BSP else {}
    ours, baseline = method(cls, domain_weight=0.0, forward_pass="split", **EASY, **arguments), method(SourceOnly)
    for made in (ours, baseline):
        optimizer = made.configure_optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            made.training_step(batch(), 0).backward()
            optimizer.step()
    for a, b in zip(ours.network.parameters(), baseline.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", [CDAN, MDD])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_adversary_descends_features_ascend_by_the_strength_and_the_head_feels_nothing(
    cls, strength, monkeypatch
) -> None:
    made = method(cls, domain_weight=2.0, max_reversal=strength, **EASY)
    images = [batch()[role]["image"] for role in ("source", "target")]
    label, head = batch()["source"]["label"], list(made.network.head.parameters())

    f_s, f_t = made.both(*images)
    adversary = made.discriminator if cls is CDAN else made.adversary
    labels = F.cross_entropy(made.network.logits(f_s), label)
    with monkeypatch.context() as plain:  # no reversal: what the adversary minimises
        for module in (adversarial, mdd):
            plain.setattr(module, "reverse_gradient", lambda x, strength: x)
        (loss,) = made.alignment(f_s, f_t, made.network.logits(f_s)).values()
    backbone = list(made.network.backbone.parameters())
    y = torch.autograd.grad(labels, backbone, retain_graph=True)
    d = torch.autograd.grad(loss, backbone, retain_graph=True)
    wanted = torch.autograd.grad(loss, list(adversary.parameters()), retain_graph=True)
    assert all(g is None for g in torch.autograd.grad(loss, head, retain_graph=True, allow_unused=True))
    own = torch.autograd.grad(labels, head)

    made.training_step(batch(), 0).backward()
    for p, a, b in zip(backbone, y, d, strict=True):
        assert torch.allclose(p.grad, a - strength * b, atol=1e-6)
    assert d[0].abs().sum() > 0
    for p, g in zip([*adversary.parameters(), *head], [*wanted, *own], strict=True):
        assert torch.allclose(p.grad, g, atol=1e-6)


@pytest.mark.parametrize("cls", [DANN, CDAN, BSP])
def test_discriminator_normalises_both_domains_together(cls) -> None:
    """Each by itself, its own statistics would hide from BatchNorm what tells the domains apart."""
    made = method(cls, discriminator=partial(DomainDiscriminator, hidden=8, layers=1), forward_pass="split", **EASY)
    made.training_step(batch(), 0)
    layer = next(m for m in made.discriminator.modules() if isinstance(m, torch.nn.BatchNorm1d))
    assert int(layer.num_batches_tracked) == 1


def test_margin_disparity_asks_the_second_head_about_the_firsts_predictions_in_both_domains() -> None:
    made = method(MDD, margin=2.5, domain_weight=3.0, **EASY)
    with torch.no_grad():
        for p in [*made.network.head.parameters(), *made.adversary.parameters()]:
            p.mul_(5)
    f_s, f_t = made.both(*(batch()[role]["image"] for role in ("source", "target")))
    said_s, said_t = made.network.logits(f_s).argmax(1), made.network.logits(f_t).argmax(1)
    agrees = made.adversary(f_s).softmax(1).gather(1, said_s[:, None])
    disagrees = 1 - made.adversary(f_t).softmax(1).gather(1, said_t[:, None])
    (ours,) = made.alignment(f_s, f_t, made.network.logits(f_s)).values()
    assert torch.allclose(ours, 3 * (-2.5 * agrees.log().mean() - disagrees.log().mean()), rtol=1e-4)


def test_penalty_is_of_so_many_directions_in_either_domain() -> None:
    made = method(BSP, spectral_weight=0.5, directions=2, **EASY)
    f_s, f_t = made.both(*(batch()[role]["image"] for role in ("source", "target")))
    values = torch.linalg.svdvals(f_s)[:2].square().sum() + torch.linalg.svdvals(f_t)[:2].square().sum()
    assert torch.allclose(made.alignment(f_s, f_t, made.network.logits(f_s))["spectral"], 0.5 * values)


def test_entropy_weighting_weighs_each_sample() -> None:
    made = method(CDAN, entropy_weighting=True, **EASY)
    size = made.network.num_features
    f_s, f_t = (20 * torch.rand(n, 1) * torch.randn(n, size) for n in (6, 4))  # some predictions are sure, some are not
    z_s, z_t = made.network.logits(f_s), made.network.logits(f_t)
    (ours,) = made.alignment(f_s, f_t, z_s).values()
    d_s, d_t = made.tell_apart(made.map(f_s, z_s.softmax(1)), made.map(f_t, z_t.softmax(1)))
    w_s, w_t = entropy_weights(z_s, z_t)
    by_hand = 0.5 * (w_s * F.softplus(-d_s)).mean() + 0.5 * (w_t * F.softplus(d_t)).mean()
    assert torch.allclose(ours, by_hand)
    assert not torch.allclose(ours, 0.5 * F.softplus(-d_s).mean() + 0.5 * F.softplus(d_t).mean(), rtol=0.002)


def test_large_maps_are_random_kept_and_unbiased() -> None:
    small, large = MultilinearMap(8, 3, limit=24), MultilinearMap(8, 3, limit=23, random_features=20_000)
    assert (small.random, small.num_features, list(small.buffers())) == (False, 24, [])
    assert (large.random, large.num_features, set(large.state_dict())) == (True, 20_000, {"of_features", "of_classes"})
    f, g = torch.randn(2, 8), torch.randn(2, 3).softmax(1)
    inner = large(f, g) @ large(f, g).T  # E <T(f,g), T(f',g')> = <f,f'> <g,g'>
    wanted = (f @ f.T) * (g @ g.T)
    assert torch.allclose(inner, wanted, atol=0.1 * wanted.abs().max().item())
    outer = small(f, g)
    assert torch.equal(outer[0].view(3, 8), torch.outer(g[0], f[0]))


def test_class_discriminators_are_separate_perceptrons() -> None:
    made = ClassDiscriminators(5, 3, hidden=4, layers=2, norm=False)
    x = torch.randn(7, 5)
    first, _, _, second, _, _, last = made.layers
    for k in range(3):
        h = F.relu(x @ first.weight[4 * k : 4 * k + 4].T + first.bias[4 * k : 4 * k + 4])
        h = F.relu(h @ second.weight[k] + second.bias[k])
        assert torch.allclose(made(x)[:, k : k + 1], h @ last.weight[k] + last.bias[k], atol=1e-6)
    assert ClassDiscriminators(5, 3, hidden=4)(x).shape == (7, 3)
    assert isinstance(second, Parallel)


def test_reversal_follows_the_trainer() -> None:
    made = method(MDD, ramp_steps=1000)
    made._trainer = SimpleNamespace(global_step=50)
    assert made.reversal == pytest.approx(0.1 * 0.2449, abs=1e-5)


def test_refusals() -> None:
    for cls, arguments, message in (
        (MDD, {"margin": 0.0}, "margin=0.0"),
        (BSP, {"spectral_weight": -1.0}, "spectral_weight=-1.0"),
        (BSP, {"directions": 0}, "directions=0"),
    ):
        with pytest.raises(UserError, match=f"{cls.__name__}: {message}"):
            method(cls, **arguments)
    with pytest.raises(UserError, match="num_classes=1"):
        MDD(network=NETWORK, num_classes=1)
    for build in (lambda: MultilinearMap(2, 2, random_features=0), lambda: ClassDiscriminators(2, 2, hidden=0)):
        with pytest.raises(UserError, match="must be at least 1"):
            build()
