import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from zoo import ITTA
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.core.stages import stages_of

LENET = partial(Network, backbone="lenet", in_channels=1)
NORMED = partial(Network, backbone="tiny_cnn", in_channels=1, arguments={"width": 4})
SGD = partial(torch.optim.SGD, lr=0.1)


def method(network=LENET, **arguments):
    torch.manual_seed(1)
    arguments = {"adaptation_weight": 1.0, "adaptation_optimizer": SGD, **arguments}
    made = ITTA(network=network, num_classes=3, **arguments)
    made.configure_model()
    return made


def adapting(made):
    made.eval()._adapts = True
    return made


def batch() -> dict:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(6, 1, 28, 28, generator=generator)
    return {"source": {"image": image, "label": torch.randint(3, (6,), generator=generator)}}


# --- training ---------------------------------------------------------------------------------------------------------


def explicit(made, b):
    """The two minimizations, each by its own gradients, from the views that the step will draw."""
    torch.manual_seed(5)
    clean, mixed = made.views(made.network, b["image"])
    assert not torch.equal(clean, mixed)
    main = cross_entropy(made.network.logits(clean), b["label"]) + cross_entropy(made.network.logits(mixed), b["label"])
    consistency = made.consistency(mixed - clean).square().mean()
    theta, w = list(made.network.parameters()), list(made.consistency.parameters())
    first = torch.autograd.grad(main + consistency, theta, retain_graph=True)
    ours = torch.cat([g.flatten() for g in torch.autograd.grad(consistency, made.theta, create_graph=True)])
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(main, made.theta, retain_graph=True)])
    ours, theirs = ((g - g.mean().item()) / g.std().item() for g in (ours, theirs))
    second = torch.autograd.grad(0.1 * (ours - theirs.detach()).square().mean(), w)
    return (main + consistency).detach(), first, second


def test_theta_follows_the_labels_and_the_consistency_and_w_the_alignment() -> None:
    made = method().double()
    b = {k: v.double() if k == "image" else v for k, v in batch()["source"].items()}
    loss, first, second = explicit(made, b)
    torch.manual_seed(5)
    ours = made.training_step({"source": b}, 0)
    ours.backward()
    assert torch.allclose(ours, loss)
    for p, g in zip(made.network.parameters(), first, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-10), "step B must not change Θ"
    assert any(g.abs().sum() > 0 for g in second)
    for p, g in zip(made.consistency.parameters(), second, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-10), "step A must not change w"


def test_no_alignment_leaves_w_alone_and_its_rate_is_a_tenth() -> None:
    made = method(alignment_weight=0.0)
    made.training_step(batch(), 0).backward()
    assert all((p.grad == 0).all() for p in made.consistency.parameters())
    rates = {g["lr"] for g in method(optimizer=SGD).configure_optimizers().param_groups}
    assert sorted(rates) == pytest.approx([0.01, 0.1])
    own = method(optimizer=SGD, lr_multipliers={"consistency": 1.0})
    assert {g["lr"] for g in own.configure_optimizers().param_groups} == {0.1}


def test_both_views_are_one_pass_up_to_the_stage() -> None:
    made, x = method(), batch()["source"]["image"]
    sizes = []
    hooks = [s.register_forward_hook(lambda m, i, o: sizes.append(len(i[0]))) for s in stages_of(made.network, None)]
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        sizes.clear()
        clean, _ = made.views(made.network, x)
        seen.add(tuple(sizes))
        assert torch.allclose(clean, made.network.features(x), atol=1e-6)
    assert seen == {(6, 12, 12, 12), (6, 6, 12, 12)}
    for hook in hooks:
        hook.remove()
    assert not any(part._forward_hooks for part in made.modules())


def test_batch_norm_of_a_pretrained_network_stays() -> None:
    frozen, free = method(NORMED), method(NORMED, freeze_batch_norm=False)
    for made in (frozen, free):
        made.train()
        before = copy.deepcopy(made.network.state_dict())
        made.training_step(batch(), 0)
        same = all(torch.equal(v, before[k]) for k, v in made.network.state_dict().items())
        assert same == (made is frozen)
        assert made.network.training


# --- test -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["element", "channel"])
def test_identity_at_first(kind) -> None:
    made, x = adapting(method(adaptive=kind, adaptation_weight=0.0)), batch()["source"]["image"]
    with torch.no_grad():
        assert torch.equal(made(x), made.predictor(x))
    assert len(made.inserted) == 4
    shapes = [part.shape for part in made.inserted.values()]
    assert shapes[0] == ((6, 14, 14) if kind == "element" else (6, 1, 1))
    assert len(made.now.named) == 4 * 5 * 2


@pytest.mark.parametrize("network", [LENET, NORMED])
def test_only_what_was_inserted_moves(network) -> None:
    made, x = adapting(method(network)), batch()["source"]["image"]
    trained = copy.deepcopy(made.state_dict())
    first = made(x)
    assert not torch.equal(first, made.predictor(x))
    for key, value in made.adapted.state_dict().items():
        assert torch.equal(value, trained[f"network.{key}"]), key
    for key, value in made.state_dict().items():
        assert torch.equal(value, trained[key]), key
    assert any((p != 1).any() for name, p in made.now.named.items() if "weights" in name)


@pytest.mark.parametrize("how", ["own style", "one sample"])
def test_equal_views_cost_nothing_and_move_nothing(how) -> None:
    made = adapting(method(style_alpha=0.0 if how == "own style" else 0.1))
    made.adaptation_optimizer_recipe = torch.optim.Adam
    x = batch()["source"]["image"][: 1 if how == "one sample" else 6]
    with torch.no_grad():
        assert torch.equal(made(x), made.predictor(x))
    for name, p in made.now.named.items():
        assert (p == (1 if "weights" in name else 0)).all(), name


def test_steps_lower_the_consistency_of_the_same_views() -> None:
    made, x = adapting(method(adaptation_optimizer=partial(torch.optim.SGD, lr=0.01))), batch()["source"]["image"]

    def cost() -> float:
        torch.manual_seed(7)
        clean, mixed = made.views(made.adapted, x)
        return float(made.consistency(mixed - clean).detach().square().mean())

    torch.manual_seed(7)
    made.reset()
    before = cost()
    torch.manual_seed(7)
    made(x)
    assert cost() < before


def test_styles_part_before_what_is_inserted_behind_the_same_stage() -> None:
    made, x = adapting(method()), batch()["source"]["image"]
    made(x)
    sizes: list[int] = []
    for part in made.inserted.values():
        part.register_forward_hook(lambda layer, inputs, output: sizes.append(len(inputs[0])))
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        sizes.clear()
        made.views(made.adapted, x)
        seen.add(tuple(sizes))
    assert seen == {(12, 12, 12, 12), (6, 12, 12, 12)}


def test_maps_of_another_size_need_channels() -> None:
    made = adapting(method())
    made(torch.randn(3, 1, 28, 28))
    with pytest.raises(UserError, match="'channel'"):
        made(torch.randn(3, 1, 36, 36))
    made = adapting(method(adaptive="channel"))
    made(torch.randn(3, 1, 28, 28))
    made(torch.randn(3, 1, 36, 36))


def test_stages_by_name_and_of_libraries() -> None:
    torchvision = Network(3, backbone="torchvision:resnet18")
    assert stages_of(torchvision, None) == [getattr(torchvision.backbone.model, f"layer{n}") for n in range(1, 5)]
    timm = Network(3, backbone="resnet18")
    assert stages_of(timm, None) == [getattr(timm.backbone.model, f"layer{n}") for n in range(1, 5)]
    with pytest.raises(UserError, match="stages"):
        method(stages=["layer9"]).views(method().network, torch.randn(2, 1, 28, 28))


def test_refusals() -> None:
    for wrong in ({"alignment_weight": -1}, {"adaptive_layers": 0}, {"adaptive": "elemen"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            method(**wrong)
    with pytest.raises(UserError, match="styles"):
        method().views(nn.Identity(), torch.zeros(2, 7, dtype=torch.int64))
