from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from zoo import MetaDMoE
from zoo.core.errors import UserError
from zoo.core.network import Network

SIZE = {"width": 16, "side": 4}
NETWORK = partial(Network, backbone="tiny_mlp", in_channels=1, arguments=SIZE)
CNN = partial(Network, backbone="tiny_cnn", in_channels=1)
OWNERS = [0, 0, 1, 2]


def batch(each: int = 5) -> dict:
    generator = torch.Generator().manual_seed(1)
    domain = torch.arange(4).repeat(each)  # not one domain after the other
    image = torch.randn(4 * each, 1, 8, 8, generator=generator) + domain.view(-1, 1, 1, 1)
    return {"source": {"image": image, "label": torch.randint(3, (4 * each,), generator=generator), "domain": domain}}


def method(progress: float = 1.0, network=NETWORK, seed: int = 0, **arguments):
    torch.manual_seed(seed)
    recipe = {"network": network, "experts": [network] * 3, "owners": OWNERS, "aggregator_heads": 4, "inner_lr": 0.5}
    made = MetaDMoE(num_classes=3, allow_untrained_experts=True, **recipe | arguments)
    made.configure_model()
    for number, expert in enumerate(made.experts):
        torch.manual_seed(100 + number)
        for p in expert.parameters():
            nn.init.normal_(p, std=0.3)
    made._trainer = SimpleNamespace(
        global_step=progress * 100, estimated_stepping_batches=100, training=False, accumulate_grad_batches=1
    )
    return made


def by_hand(made, b, each: int = 5, first: bool = False):
    """The outer loss, from the parameters of the backbone."""
    x, y, d = (b["source"][key] for key in ("image", "label", "domain"))
    count = round(0.6 * each)
    losses = []
    network, body = made.network, [*made.network.backbone.parameters()]
    names = [f"backbone.{name}" for name, _ in made.network.backbone.named_parameters()]
    for s, owner in enumerate(OWNERS):
        rows = (d == s).nonzero().flatten()
        support, query = rows[:count], rows[count:]
        features = [e.module.features(x[support]).detach() for n, e in enumerate(made.experts) if n != owner]
        target = made.aggregator(torch.stack(features, dim=1))
        distance = (target - network.features(x[support])).square().mean()
        g = torch.autograd.grad(distance, body, create_graph=True)
        g = [v.detach() for v in g] if first else g
        moved = {name: p - made.inner_lr * v for name, p, v in zip(names, body, g, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(network, moved, (x[query],)), y[query]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("order", ["first", "second"])
def test_outer_loss_and_its_gradients_are_those_of_a_loop_over_the_domains(order) -> None:
    ours, theirs = (method(order=order).double().eval() for _ in range(2))
    b = batch()
    b["source"]["image"] = b["source"]["image"].double()
    loss = ours.training_step(b, 0)
    wanted = by_hand(theirs, b, first=order == "first")
    assert torch.allclose(loss, wanted, atol=1e-10)
    loss.backward()
    wanted.backward()
    for (name, p), q in zip(ours.network.named_parameters(), theirs.network.parameters(), strict=True):
        assert q.grad.abs().sum() > 0, name
        assert torch.allclose(p.grad, q.grad, atol=1e-9), name
    for p, q in zip(ours.aggregator.parameters(), theirs.aggregator.parameters(), strict=True):
        if order == "first":
            assert q.grad is None
            assert p.grad.abs().sum() == 0
        else:
            assert torch.allclose(p.grad, q.grad, atol=1e-9)
    if order == "second":
        assert sum(p.grad.abs().sum() for p in ours.aggregator.parameters()) > 1e-6


def test_a_step_of_no_length_leaves_the_loss_of_the_query() -> None:
    made, b = method(inner_lr=1e-30), batch()
    rows = b["source"]["domain"].argsort(stable=True).view(4, -1)[:, 3:].flatten()
    logits = made.network(b["source"]["image"][rows])
    assert torch.allclose(made.training_step(b, 0), F.cross_entropy(logits, b["source"]["label"][rows]), atol=1e-6)


def test_step_brings_the_student_nearer_to_the_targets() -> None:
    made, seen = method(inner_lr=0.05), {}
    made._trainer.training, made._trainer._logger_connector = True, SimpleNamespace(should_update_logs=True)
    made.log_dict = lambda *_, **__: None
    made.observe = lambda **values: seen.update(values)
    made.training_step(batch(), 0)
    assert seen["distance_change"] < 0


@pytest.mark.parametrize("mask", ["drop", "zero"])
def test_the_expert_that_knows_a_domain_has_no_say_in_it(mask) -> None:
    made = method(mask=mask, owners=[1, 1, 1, 1])
    loss = made.training_step(batch(), 0)
    for p in made.experts[1].parameters():
        nn.init.normal_(p, std=3.0)
    assert torch.equal(made.training_step(batch(), 0), loss)
    for p in made.experts[0].parameters():
        nn.init.normal_(p, std=3.0)
    assert not torch.allclose(made.training_step(batch(), 0), loss, atol=1e-6)


def test_experts_neither_learn_nor_change() -> None:
    for progress in (0.0, 1.0):
        made = method(progress, network=CNN)
        before = {k: v.clone() for k, v in made.experts.state_dict().items()}
        made.train()
        made.training_step(batch(), 0).backward()
        assert all(p.grad is None for p in made.experts.parameters())
        assert all(torch.equal(before[k], v) for k, v in made.experts.state_dict().items())
        assert all(p.grad is not None for name, p in made.named_parameters() if not name.startswith("experts"))


def test_the_second_part_is_in_evaluation_mode_and_leaves_modes_and_statistics_alone() -> None:
    made = method(network=CNN).train()
    made.network.head.eval()
    before = {k: v.clone() for k, v in made.network.state_dict().items()}
    losses = [made.training_step(batch(), 0) for _ in range(2)]
    assert torch.equal(*losses)  # no dropout
    assert made.network.backbone.training
    assert made.aggregator.training
    assert not made.network.head.training
    assert all(torch.equal(before[k], v) for k, v in made.network.state_dict().items())


def test_first_part_fits_labels_with_student_and_aggregator() -> None:
    made, b = method(0.0).eval(), batch()
    x, y = b["source"]["image"], b["source"]["label"]
    tokens = torch.stack([expert.module.features(x) for expert in made.experts], dim=1)
    aggregated = made.aggregator_head(made.aggregator(tokens))
    wanted = F.cross_entropy(made.network(x), y) + F.cross_entropy(aggregated, y)
    assert torch.allclose(made.training_step(b, 0), wanted, atol=1e-6)


def test_the_aggregator_may_go_on_with_the_labels() -> None:
    b, losses = batch(), []
    for weight in (0.0, 0.7):
        made = method(aggregator_weight=weight)
        losses.append(made.training_step(b, 0))
    x, y, d = (b["source"][key] for key in ("image", "label", "domain"))
    own = []
    for s, owner in enumerate(OWNERS):
        rows = (d == s).nonzero().flatten()[:3]
        others = [e.module.features(x[rows]) for n, e in enumerate(made.experts) if n != owner]
        own.append(F.cross_entropy(made.aggregator_head(made.aggregator.eval()(torch.stack(others, dim=1))), y[rows]))
    assert torch.allclose(losses[1] - losses[0], 0.7 * torch.stack(own).mean(), atol=1e-6)


def test_networks_with_attention_are_differentiated_twice() -> None:
    arguments = {"depth": 1, "embed_dim": 48}
    vit = partial(Network, backbone="vit_tiny_cifar", in_channels=1, image_size=8, arguments=arguments)
    made = method(network=vit)
    made.training_step(batch(), 0).backward()
    grads = [p.grad for p in [*made.network.parameters(), *made.aggregator.parameters()]]
    assert all(torch.isfinite(g).all() for g in grads)


# Test time


def loader(x: torch.Tensor) -> DataLoader:
    """Batches of one set."""
    batches = [{"image": c, "label": torch.zeros(len(c)).long(), "index": torch.arange(len(c))} for c in x.split(6)]
    return DataLoader(batches, batch_size=None)


def predicted(made, *sets):
    made._trainer = None
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = trainer.predict(made, [loader(x) for x in sets])
    found = [found] if len(sets) == 1 else found
    return [torch.cat([batch["probabilities"] for batch in one]) for one in found]


def test_a_set_is_predicted_after_one_step_on_its_first_batch() -> None:
    made = method(inner_lr=0.2).eval()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    one, other = torch.randn(14, 1, 8, 8), torch.randn(9, 1, 8, 8) + 1
    found, found_other = predicted(made, one, other)

    body = dict(made.network.backbone.named_parameters())
    target = made.aggregator(torch.stack([e.module.features(one[:6]) for e in made.experts], dim=1))
    distance = (target - made.network.features(one[:6])).square().mean()
    g = torch.autograd.grad(distance, list(body.values()))
    moved = {f"backbone.{name}": p - 0.2 * v for (name, p), v in zip(body.items(), g, strict=True)}
    wanted = torch.func.functional_call(made.network, moved, (one,)).softmax(dim=1)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, made.network(one).softmax(dim=1), atol=1e-4)

    assert torch.equal(predicted(made, other)[0], found_other)  # whatever was tested before
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())


def test_ranks_make_one_step_together(on_ranks) -> None:
    x = torch.randn(9, 1, 8, 8)

    def run(rank: int) -> list[torch.Tensor]:
        made = method(inner_lr=0.5).eval()
        made._adapts = True
        made(x[:4] if rank == 0 else x[4:])
        return [p.detach() for p in made.adapted.parameters()]

    trained = list(method().network.parameters())
    found = on_ranks(run)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(found[0][0], trained[0])


def test_the_first_batch_is_predicted_with_the_step_in_16_bits_too() -> None:
    made, x = method(inner_lr=0.5).eval(), torch.randn(6, 1, 8, 8)
    made._adapts = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = made(x)
        torch.clear_autocast_cache()
        assert torch.equal(made(x), first), "16-bit copies of before the step"
        assert not torch.equal(made.network(x), first)


def test_episodic_makes_the_step_in_every_batch() -> None:
    made, x = method(inner_lr=0.2, mode="episodic").eval(), torch.randn(12, 1, 8, 8)
    (found,) = predicted(made, x)
    alone = predicted(made, x[6:])[0]
    assert torch.equal(found[6:], alone)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"experts": [NETWORK]}, "at least 2"),
        ({"owners": [0, 3]}, "owners"),
        ({"owners": []}, "owners"),
        ({"mask": "dropp"}, "drop"),
        ({"order": "third"}, "order"),
        ({"inner_lr": 0.0}, "inner_lr"),
        ({"support": 1.0}, "support"),
        ({"warmup": 2.0}, "warmup"),
        ({"aggregator_weight": -1.0}, "aggregator_weight"),
        ({"aggregator_heads": 5}, "heads=5"),
        ({"experts": [NETWORK, partial(NETWORK, arguments={**SIZE, "width": 8})]}, "expert 1 has 8"),
    ],
)
def test_bad_arguments(arguments, named) -> None:
    base = {"experts": [NETWORK] * 3, "owners": OWNERS, "aggregator_heads": 4}
    if "experts" in arguments:
        base["owners"] = [0, 1]
    with pytest.raises(UserError, match=named):
        MetaDMoE(network=NETWORK, num_classes=3, **{**base, **arguments}).configure_model()


def test_unequal_domains_and_untrained_experts_are_refused() -> None:
    made = method()
    short = {"source": {k: v[:-1] for k, v in batch()["source"].items()}}
    with pytest.raises(UserError, match="as many samples"):
        made.training_step(short, 0)
    made.allow_untrained_experts = False
    with pytest.raises(UserError, match="random weights"):
        made.on_fit_start()
