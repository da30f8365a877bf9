import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from zoo import DANN, SourceOnly
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.discriminators import DomainDiscriminator
from zoo.losses import domain_loss

NETWORK = partial(Network, backbone="lenet", in_channels=1)
SGD = partial(torch.optim.SGD, lr=0.1)
SMALL = partial(DomainDiscriminator, hidden=8, layers=1, norm=False)


def batch(source: int = 6, target: int = 4) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "source": {
            "image": torch.randn(source, 1, 28, 28, generator=generator),
            "label": torch.randint(3, (source,), generator=generator),
        },
        "target": {"image": torch.randn(target, 1, 28, 28, generator=generator) + 1},
    }


def method(cls: type = DANN, strength: float | None = None, **arguments):
    if cls is DANN:
        arguments = {"discriminator": SMALL, **arguments}
    torch.manual_seed(0)
    made = cls(network=NETWORK, num_classes=3, optimizer=SGD, **arguments)
    made.configure_model()
    if strength is not None:  # outside a trainer λ is 0
        made._trainer = SimpleNamespace(
            global_step=10**9,
            estimated_stepping_batches=10**9,
            training=False,
        )
        made.max_reversal = strength / (2 / (1 + math.exp(-10)) - 1)
    return made


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_one_backward_is_the_explicit_min_max(forward_pass) -> None:
    """θ_G follows ∇L_y - λ∇L_d, θ_C follows ∇L_y, θ_D follows +∇L_d without λ (eq. 13-15)."""
    strength = 0.6
    ours = method(strength=strength, domain_weight=1.0, forward_pass=forward_pass).double()
    theirs = copy.deepcopy(ours)
    b = batch()
    b = {role: {k: v.double() if k == "image" else v for k, v in part.items()} for role, part in b.items()}
    ours.training_step(b, 0).backward()

    f_s = theirs.network.features(b["source"]["image"])
    f_t = theirs.network.features(b["target"]["image"])
    label_loss = F.cross_entropy(theirs.network.logits(f_s), b["source"]["label"])
    d_s, d_t = theirs.discriminator(f_s), theirs.discriminator(f_t)
    d_loss = 0.5 * F.binary_cross_entropy_with_logits(d_s, torch.ones_like(d_s))
    d_loss = d_loss + 0.5 * F.binary_cross_entropy_with_logits(d_t, torch.zeros_like(d_t))

    features = list(theirs.network.backbone.parameters())
    y, d = (torch.autograd.grad(loss, features, retain_graph=True) for loss in (label_loss, d_loss))
    for p, g_y, g_d in zip(ours.network.backbone.parameters(), y, d, strict=True):
        assert g_d.abs().sum() > 0
        assert torch.allclose(p.grad, g_y - strength * g_d, atol=1e-12)
    for part, loss in (("discriminator", d_loss), ("network.head", label_loss)):
        wanted = torch.autograd.grad(loss, list(theirs.get_submodule(part).parameters()), retain_graph=True)
        for p, g in zip(ours.get_submodule(part).parameters(), wanted, strict=True):
            assert torch.allclose(p.grad, g, atol=1e-12)


def test_discriminator_does_not_feel_the_strength() -> None:
    gradients = []
    for strength in (0.0, 0.1, 2.0):
        made = method(strength=strength)
        made.training_step(batch(), 0).backward()
        gradients.append([p.grad.clone() for p in made.discriminator.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize(("part", "sign"), [("discriminator", -1), ("network.backbone", 1)])
def test_a_descent_step_makes_the_discriminator_better_and_the_features_harder_for_it(part, sign) -> None:
    made = method(strength=1.0, domain_weight=100.0)  # so that the labels hardly matter

    @torch.no_grad()
    def told_apart() -> float:
        source, target = (made.network.features(batch()[role]["image"]) for role in ("source", "target"))
        return domain_loss(made.discriminator(source), made.discriminator(target)).item()

    before = told_apart()
    made.training_step(batch(), 0).backward()
    with torch.no_grad():
        for p in made.get_submodule(part).parameters():
            p -= 1e-5 * p.grad
    assert sign * (told_apart() - before) > 0


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.0), (100, 0.0500), (500, 0.2449), (1000, 0.4621), (2000, 0.7616), (5000, 0.9866), (10000, 0.9999)],
)
def test_table_of_strengths(step, value) -> None:
    """The paper's schedule over 10,000 steps and TLlib's (α = 1, N = 1000) are the same numbers."""
    paper, tllib = method(strength=1.0), method(strength=1.0, ramp_steps=10_000)
    for made, length in ((paper, 10_000), (tllib, 77_777)):
        made._trainer.global_step, made._trainer.estimated_stepping_batches, made.max_reversal = step, length, 1.0
        assert made.reversal == pytest.approx(value, abs=5e-5)
        assert made.reversal == pytest.approx(2 / (1 + math.exp(-step / 1000)) - 1, abs=1e-12)


def test_strength_is_0_without_a_trainer_and_1_at_the_end_of_tllibs_ramp() -> None:
    assert method().reversal == 0
    made = method(strength=1.0, ramp_steps=10)
    made.max_reversal = 1.0
    assert made.reversal == pytest.approx(0.9999, abs=1e-4)


def test_weight_zero_is_source_only_bit_for_bit() -> None:
    ours, baseline = method(strength=1.0, domain_weight=0.0, forward_pass="split"), method(SourceOnly)
    for made in (ours, baseline):
        optimizer = made.configure_optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            made.training_step(batch(), 0).backward()
            optimizer.step()
    for a, b in zip(ours.network.parameters(), baseline.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_discriminator_takes_no_random_numbers_from_what_follows() -> None:
    method()
    ours = torch.rand(3)
    method(SourceOnly)
    assert torch.equal(ours, torch.rand(3))


def test_joint_and_split_differ_only_by_batch_statistics() -> None:
    plain = [method(strength=0.5, forward_pass=how).training_step(batch(), 0) for how in ("joint", "split")]
    assert torch.allclose(*plain)
    normed = partial(Network, backbone="lenet", in_channels=1, arguments={"norm": True})
    losses, means = [], []
    for how in ("joint", "split"):
        torch.manual_seed(0)
        made = DANN(network=normed, num_classes=3, discriminator=SMALL, forward_pass=how)
        made.configure_model()
        losses.append(made.training_step(batch(), 0))
        means.append(next(m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)).num_batches_tracked)
    assert not torch.allclose(*losses)
    assert [int(m) for m in means] == [1, 2]


def test_identical_domains_cost_log_2_at_best_and_nothing_can_be_told() -> None:
    made = method(strength=1.0)
    b = batch(6, 6)
    b["target"]["image"] = b["source"]["image"]
    for p in made.network.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.Adam(made.discriminator.parameters(), lr=0.02)
    label = F.cross_entropy(made.network(b["source"]["image"]), b["source"]["label"])
    for _ in range(300):
        optimizer.zero_grad()
        loss = made.training_step(b, 0)
        loss.backward()
        optimizer.step()
    assert (loss - label).item() == pytest.approx(math.log(2), abs=1e-3)


def test_features_of_a_rate_of_their_own() -> None:
    made = method(lr_multipliers={"network.backbone": 0.1})
    rates = sorted({group["lr"] for group in made.configure_optimizers().param_groups})
    assert rates == pytest.approx([0.01, 0.1])


def test_constant_strength() -> None:
    assert method(ramp_steps=0, max_reversal=0.3).reversal == 0.3


def test_refusals() -> None:
    for arguments, message in (
        ({"ramp_steps": -1}, "ramp_steps=-1"),
        ({"max_reversal": -0.1}, "max_reversal=-0.1"),
        ({"domain_weight": -1.0}, "domain_weight=-1.0"),
    ):
        with pytest.raises(UserError, match=f"DANN: {message}"):
            method(**arguments)
    with pytest.raises(UserError, match="layers=0"):
        DomainDiscriminator(4, layers=0)
