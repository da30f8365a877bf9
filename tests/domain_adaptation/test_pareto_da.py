import copy
import math
from functools import partial

import pytest
import torch

from zoo import ADDA, BSP, CDAN, DANN, MCC, MDD, ParetoDA
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation import pareto_da
from zoo.domain_adaptation.discriminators import ClassDiscriminators, DomainDiscriminator
from zoo.losses.mimicking import class_domain_loss, mutual_information, refined_log_probabilities

NETWORK = partial(Network, backbone="lenet", in_channels=1)
SMALL = {"discriminator": partial(DomainDiscriminator, hidden=8, layers=1, norm=False)}
CLASSES = partial(ClassDiscriminators, hidden=4, layers=1, norm=False)


def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "source": {
            "image": torch.randn(6, 1, 28, 28, generator=generator),
            "label": torch.randint(3, (6,), generator=generator),
        },
        "target": {"image": torch.randn(4, 1, 28, 28, generator=generator) + 1},
        "held_out": {"image": torch.randn(5, 1, 28, 28, generator=generator) + 1},
    }


def method(inner: type = DANN, network=NETWORK, given: dict | None = None, **arguments):
    torch.manual_seed(0)
    own = {"ramp_steps": 0, **({} if inner is MDD else SMALL)} if given is None else given
    made = ParetoDA(method=partial(inner, **own), discriminators=CLASSES, network=network, num_classes=3, **arguments)
    made.configure_model()
    return made


def losses(made) -> tuple[list, list, list, list]:
    """The losses and their gradients for the features, one by one."""
    x_s, x_t, x_v = (batch()[role]["image"] for role in ("source", "target", "held_out"))
    inner = made.method
    f_s, f_t = inner.both(x_s, x_t)
    z = inner.network.logits(f_s)
    label = torch.nn.functional.cross_entropy(z, batch()["source"]["label"])
    alignment = sum(inner.alignment(f_s, f_t, z).values())
    v = inner.class_discriminators
    rho = refined_log_probabilities(inner.network.logits(f_t), v(f_t))
    f_v = inner.network.features(x_v)
    guide = math.log(3) - mutual_information(refined_log_probabilities(inner.network.logits(f_v), v(f_v)))
    classes = class_domain_loss(v(f_s.detach()), v(f_t.detach()), batch()["source"]["label"], rho.exp())
    found = [label, alignment, -mutual_information(rho), guide]
    shared = list(inner.network.backbone.parameters())
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(x, shared, retain_graph=True)]) for x in found]
    return found, rows, shared, [label, alignment, classes]


@pytest.mark.parametrize("inner", [DANN, CDAN, MDD])
@pytest.mark.parametrize(("guided", "plain_gradients"), [(True, False), (False, False), (True, True)])
def test_features_follow_the_weighted_sum_and_all_else_the_plain_one(inner, guided, plain_gradients) -> None:
    made = method(inner, guided=guided, plain_gradients=plain_gradients)
    _, rows, shared, plain = losses(made)
    g = torch.stack(rows[:3])
    w = pareto_da.pareto_weights(g @ g.T, g @ rows[3], guided)
    made.training_step(batch(), 0).backward()
    direction = torch.cat([p.grad.flatten() for p in shared])
    added = g[0] + g[1] if plain_gradients else 0.0
    assert torch.allclose(direction, 3 * w.float() @ g + added, rtol=1e-3, atol=1e-5)
    known = {id(p) for p in shared}
    others = [p for p in made.parameters() if id(p) not in known]
    assert len(others) > 4
    wanted = torch.autograd.grad(sum(plain), others)
    for p, grad in zip(others, wanted, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-6)


@pytest.mark.parametrize("plain_gradients", [False, True])
def test_steps_between_two_programs_take_the_last_weights(plain_gradients) -> None:
    made = method(every=2, plain_gradients=plain_gradients)
    made.training_step(batch(), 0)
    kept = made.method.pareto_weights.clone()
    assert not torch.allclose(kept, torch.full((3,), 1 / 3))
    with torch.no_grad():  # elsewhere the program would find others
        for p in made.method.parameters():
            p.mul_(0.7)
    reference = copy.deepcopy(made)
    _, rows, shared, plain = losses(reference)
    g = torch.stack(rows[:3])
    assert not torch.allclose(pareto_da.pareto_weights(g @ g.T, g @ rows[3], True).float(), kept, atol=1e-3)
    made.zero_grad()
    made.training_step(batch(), 1).backward()
    assert torch.equal(made.method.pareto_weights, kept)
    ours = torch.cat([p.grad.flatten() for p in made.network.backbone.parameters()])
    wanted = 3 * kept @ g + (g[0] + g[1] if plain_gradients else 0.0)
    assert torch.allclose(ours, wanted, rtol=1e-3, atol=1e-5)
    known = {id(p) for p in shared}
    others = [p for p in reference.parameters() if id(p) not in known]
    for p, grad in zip(
        [p for n, p in made.named_parameters() if "backbone" not in n],
        torch.autograd.grad(sum(plain), others),
        strict=True,
    ):
        assert torch.allclose(p.grad, grad, atol=1e-6)


def test_micro_batches_add_up_in_memory_that_is_kept() -> None:
    made = method(guided=False)
    alone = []
    for factor in (1.0, 0.5, 0.25):
        made.zero_grad()
        (factor * made.training_step(batch(), 0)).backward()
        alone.append([p.grad.clone() for p in made.method.parameters() if p.grad is not None])
    made.zero_grad()
    for factor in (1.0, 0.5, 0.25):
        (factor * made.training_step(batch(), 0)).backward()
    together = [p.grad for p in made.method.parameters() if p.grad is not None]
    for grad, *parts in zip(together, *alone, strict=True):
        assert torch.allclose(grad, sum(parts), rtol=1e-4, atol=1e-6)
    assert torch.allclose(alone[0][0], 4 * alone[2][0], rtol=1e-4, atol=1e-6)


def test_every_gradient_has_memory_of_its_own() -> None:
    p, q, r, unused = (torch.ones(3, requires_grad=True) for _ in range(4))
    found = pareto_da.gradients_of((p + q).square().sum() + r.sum(), [p, q, r, unused])
    torch._foreach_mul_(found, torch.tensor(2.0))
    assert [g.tolist() for g in found] == [[8.0] * 3, [8.0] * 3, [2.0] * 3, [0.0] * 3]


def test_no_loss_rises_without_a_guide() -> None:
    made = method(guided=False)
    _, rows, shared, _ = losses(made)
    made.training_step(batch(), 0).backward()
    direction = torch.cat([p.grad.flatten() for p in shared])
    for row in rows[:3]:
        assert (direction @ row).item() >= -1e-4 * row.norm().item() * direction.norm().item()


def test_head_and_discriminator_learn_as_in_the_inner_method(monkeypatch) -> None:
    made = method()
    made.training_step(batch(), 0).backward()
    plain = method()
    plain.method.training_step(batch(), 0).backward()
    for part in ("network.head", "discriminator"):
        for a, b in zip(
            made.method.get_submodule(part).parameters(), plain.method.get_submodule(part).parameters(), strict=True
        ):
            assert torch.allclose(a.grad, b.grad, atol=1e-7)
    # all the weight on what the inner method has makes its step, up to the factor
    monkeypatch.setattr(pareto_da, "pareto_weights", lambda *_: torch.tensor([1 / 3, 1 / 3, 0.0]).double())
    made.zero_grad()
    made.training_step(batch(), 0).backward()
    for a, b in zip(made.method.network.backbone.parameters(), plain.method.network.backbone.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_guide_counts_until_predictions_are_certain_and_balanced() -> None:
    seen: list = []
    real = pareto_da.pareto_weights

    def watched(products, guide, counts):
        seen.append(bool(counts))
        return real(products, guide, counts)

    pareto_da.pareto_weights = watched
    try:
        for tolerance in (1e-3, 2.0):  # log 3 at most
            method(tolerance=tolerance).training_step(batch(), 0)
    finally:
        pareto_da.pareto_weights = real
    assert seen == [True, False]


def test_held_out_samples_leave_no_trace_in_running_statistics() -> None:
    normed = partial(Network, backbone="lenet", in_channels=1, arguments={"norm": True})
    ours = method(network=normed)
    before = copy.deepcopy(ours.method)
    ours.training_step(batch(), 0)
    before.training_step(batch(), 0)
    for a, b in zip(ours.method.network.buffers(), before.network.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_other_losses_can_be_combined(forward_pass) -> None:
    for inner, given in ((MCC, {}), (BSP, SMALL)):
        made = method(inner, given={"forward_pass": forward_pass, **given})
        made.training_step(batch(), 0).backward()
        assert all(p.grad is not None for p in made.parameters())


def test_the_layout_of_the_weights_changes_nothing() -> None:
    made = []
    for channels_last in (False, True):
        ours = method(network=partial(NETWORK, channels_last=channels_last)).double()
        twice = {role: {k: v.double() if k == "image" else v for k, v in x.items()} for role, x in batch().items()}
        ours.training_step(twice, 0).backward()
        made.append(ours)
    deep = [max(m.network.backbone.parameters(), key=torch.Tensor.numel) for m in made]
    assert [weight.is_contiguous() for weight in deep] == [True, False]
    assert deep[1].grad.stride() == deep[1].stride()
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_rows_are_views_of_weights_in_any_order() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        p = torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=layout)
        row = pareto_da.in_memory_order(p, p)
        assert row.data_ptr() == p.data_ptr()
        assert torch.equal(pareto_da.as_parameter(row, p), p)
    assert pareto_da.in_memory_order(torch.ones(()), torch.ones(())).shape == (1,)


def test_weights_have_the_inner_methods_names() -> None:
    made = method()
    names = {name.split(".")[0] for name in made.state_dict()}
    assert names == {"network", "discriminator", "class_discriminators", "pareto_weights"}
    assert made.source_views == made.target_views == ("image",)


def test_refusals() -> None:
    with pytest.raises(UserError, match="tolerance=-1"):
        method(tolerance=-1.0)
    with pytest.raises(UserError, match="method=ADDA takes steps of its own kind"):
        method(ADDA, given=SMALL)
    with pytest.raises(UserError, match="every=0 must be at least 1"):
        method(every=0)
    made = method()
    short = {role: batch()[role] for role in ("source", "target")}
    with pytest.raises(UserError, match="HeldOutDomainData"):
        made.training_step(short, 0)
