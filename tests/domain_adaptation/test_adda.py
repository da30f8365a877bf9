from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from zoo import ADDA, SourceOnly
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.discriminators import DomainDiscriminator

NETWORK = partial(Network, backbone="lenet", in_channels=1)
SMALL = partial(DomainDiscriminator, hidden=8, layers=1, norm=False)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)


def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "source": {
            "image": torch.randn(6, 1, 28, 28, generator=generator),
            "label": torch.randint(3, (6,), generator=generator),
        },
        "target": {"image": torch.randn(4, 1, 28, 28, generator=generator) + 1},
    }


def method(cls: type = ADDA, **arguments):
    if cls is ADDA:
        arguments = {"discriminator": SMALL, **arguments}
    torch.manual_seed(0)
    made = cls(network=NETWORK, num_classes=3, optimizer=SGD, **arguments)
    made.configure_model()
    optimizer = made.configure_optimizers()
    made.optimizers = lambda use_pl_optimizer=True: optimizer
    made._trainer = SimpleNamespace(
        global_step=0, estimated_stepping_batches=4, training=False, strategy=None, accumulate_grad_batches=1
    )
    return made, optimizer


def step(made, optimizer):
    loss = made.training_step(batch(), 0)
    optimizer.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)  # ddp waits for all
    made.on_before_optimizer_step(optimizer)
    optimizer.step()
    made._trainer.global_step += 1
    return loss


def kept(module) -> list:
    return [p.detach().clone() for p in module.state_dict().values()]


def unmoved(before, module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values(), strict=True))


def test_first_the_source_then_the_target() -> None:
    made, optimizer = method()
    plain, its = method(SourceOnly)
    plain.on_before_optimizer_step = lambda optimizer: None
    discriminator = kept(made.discriminator)
    for _ in range(2):
        step(made, optimizer)
        step(plain, its)
    assert unmoved(kept(plain.network), made.network)  # bit for bit
    assert unmoved(discriminator, made.discriminator)
    assert not made.started

    learnt, head = kept(made.network), kept(made.network.head)
    assert optimizer.state
    made.training_step(batch(), 0)
    assert not optimizer.state  # it begins anew: what the source's steps left would go on moving the features
    step(made, optimizer)
    assert made.started
    assert unmoved(learnt, made.source_network.module)
    assert unmoved(head, made.network.head)
    assert not unmoved(learnt, made.network)
    assert not unmoved(discriminator, made.discriminator)
    step(made, optimizer)
    assert unmoved(learnt, made.source_network.module)  # still
    assert unmoved(head, made.network.head)


def test_adaptation_follows_the_inverted_label() -> None:
    made, _ = method(pretrain=0.0, domain_weight=2.0, ramp_steps=0)  # a λ that must not matter
    made.begin()
    with torch.no_grad():
        for p in made.network.parameters():  # the target's network has gone on, the source's has not
            p.add_(0.05 * torch.randn_like(p))
    made.training_step(batch(), 0).backward()
    with torch.no_grad():
        f_s = made.source_network.module.features(batch()["source"]["image"])
    f_t = made.network.features(batch()["target"]["image"])
    mapping = 2.0 * F.softplus(-made.discriminator(f_t)).mean()
    d_s, d_t = made.discriminator(f_s), made.discriminator(f_t.detach())
    domain = F.softplus(-d_s).mean() + F.softplus(d_t).mean()  # 2 times a half
    for part, loss in ((made.network.backbone, mapping), (made.discriminator, domain)):
        for p, g in zip(part.parameters(), torch.autograd.grad(loss, list(part.parameters())), strict=True):
            assert g.abs().sum() > 0
            assert torch.allclose(p.grad, g, atol=1e-6)


def test_statistics_of_the_discriminator_are_those_of_its_own_batch_alone() -> None:
    made, _ = method(pretrain=0.0, discriminator=partial(DomainDiscriminator, hidden=8, layers=1))
    made.training_step(batch(), 0)
    layer = next(m for m in made.discriminator.modules() if isinstance(m, torch.nn.BatchNorm1d))
    assert int(layer.num_batches_tracked) == 1  # the mapping's pass normalises by the batch, and is forgotten


def test_reversal_instead() -> None:
    made, _ = method(pretrain=0.5, inverted=False, max_reversal=2.0, ramp_steps=0)
    made.begin()
    made.training_step(batch(), 0).backward()
    f_t = made.network.features(batch()["target"]["image"])
    loss = 0.5 * F.softplus(made.discriminator(f_t)).mean()
    wanted = torch.autograd.grad(loss, list(made.network.backbone.parameters()))
    for p, g in zip(made.network.backbone.parameters(), wanted, strict=True):
        assert torch.allclose(p.grad, -2.0 * g, atol=1e-6)


def test_ramp_counts_from_the_adaptation() -> None:
    made, _ = method(pretrain=0.25)
    for at, value in ((0, 0.0), (100, 0.0), (250, 0.5), (400, 1.0)):
        made._trainer.global_step, made._trainer.estimated_stepping_batches = at, 400
        assert made.ramp == pytest.approx(value)
    made.ramp_steps = 600
    assert made.ramp == pytest.approx(0.5)


def test_reloaded_in_the_middle_goes_on() -> None:
    made, optimizer = method(pretrain=0.5)
    for _ in range(3):
        step(made, optimizer)
    other, _ = method(pretrain=0.5)
    other.load_state_dict(made.state_dict())
    other._trainer.global_step = 3
    frozen = kept(other.source_network.module)
    made.zero_grad()
    assert torch.equal(made.training_step(batch(), 0), other.training_step(batch(), 0))
    assert unmoved(frozen, other.source_network.module)


def test_refusals() -> None:
    for arguments, message in (({"pretrain": 1.0}, "pretrain=1.0"), ({"forward_pass": "joint"}, "forward_pass=joint")):
        with pytest.raises(UserError, match=f"ADDA: {message}"):
            method(**arguments)
