"""What FixMatch's relatives have in common, whatever their policy."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo import UDA, AdaMatch, Dash, DebiasMatch, FixMatch, FlexMatch, FreeMatch, SoftMatch, Supervised
from zoo.core.errors import UserError
from zoo.policies import DebiasedThreshold, DynamicThreshold, FlexibleThreshold, SelfAdaptiveThreshold, Threshold

METHODS: dict[type[FixMatch], dict[str, Any]] = {
    UDA: {"policy": partial(Threshold, threshold=0.4, temperature=0.4, soft=True)},
    FlexMatch: {"policy": partial(FlexibleThreshold, threshold=0.5)},
    FreeMatch: {"policy": partial(SelfAdaptiveThreshold, momentum=0.5)},
    SoftMatch: {},
    AdaMatch: {"ramp": 0.0},
    Dash: {"policy": partial(DynamicThreshold, warmup_steps=1)},
    DebiasMatch: {"policy": partial(DebiasedThreshold, threshold=0.4, momentum=0.5)},
}
each = pytest.mark.parametrize("kind", METHODS)


def network(num_outputs: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, num_outputs), nn.LayerNorm(num_outputs))


def build(kind: type, **arguments: Any) -> Any:
    method = kind(network=network, num_classes=4, **arguments)
    method.configure_model()
    if isinstance(getattr(method, "policy", None), FlexibleThreshold):
        method.policy.prepare(torch.arange(40))
    return method


def batch(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x, u = 2 * torch.randn(6, 6, generator=g), 2 * torch.randn(12, 6, generator=g)
    return {
        "labeled": {"image": x, "strong": x, "label": torch.randint(4, (6,), generator=g)},
        "unlabeled": {
            "weak": u,
            "strong": u + 0.3 * torch.randn(12, 6, generator=g),
            "index": torch.randperm(40, generator=g)[:12],
        },
    }


def warm(method: FixMatch) -> FixMatch:
    """The policy has seen two batches."""
    for seed in (1, 2):
        method.training_step(batch(seed), 0)
    return method


def gradient(method: nn.Module, loss: Tensor) -> Tensor:
    method.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in method.network.parameters()])


@each
def test_weight_zero_is_the_supervised_baseline(kind) -> None:
    more = {"fairness_weight": 0.0} if kind is FreeMatch else {}
    method = warm(build(kind, unlabeled_weight=0.0, forward_pass="split", **METHODS[kind], **more))
    supervised = build(Supervised)
    losses = [m.training_step(batch(), 0) for m in (method, supervised)]
    # AdaMatch learns two views of the labeled samples, which are the same here
    torch.testing.assert_close(*losses, rtol=1e-6 if kind is AdaMatch else 0.0, atol=0.0)
    # a product over more rows, though they are zeros, may be summed in another order
    torch.testing.assert_close(gradient(method, losses[0]), gradient(supervised, losses[1]), rtol=1e-5, atol=1e-7)


@each
def test_the_unlabeled_term_pulls_elsewhere_than_the_labels(kind) -> None:
    method = warm(build(kind, **METHODS[kind]))
    outputs = method.student(batch())
    terms = method.losses(batch(), outputs, method.targets(batch(), outputs))
    assert terms["unlabeled"].item() > 0.0
    parts = [gradient(method, method.losses(batch(), o, method.targets(batch(), o))[name])
             for name in ("supervised", "unlabeled") for o in [method.student(batch())]]  # fmt: skip
    assert parts[1].norm() > 1e-3
    assert torch.cosine_similarity(*parts, dim=0).abs() < 0.99


@each
def test_strong_views_learn_and_weak_views_do_not(kind) -> None:
    method, b = warm(build(kind, **METHODS[kind])), batch()
    weak, strong = b["unlabeled"]["weak"].requires_grad_(), b["unlabeled"]["strong"].requires_grad_()
    method.training_step(b, 0).backward()
    assert weak.grad is None or not weak.grad.any()
    assert strong.grad.any()


@each
def test_weak_views_label_the_strong_ones(kind) -> None:
    method, b = warm(build(kind, **METHODS[kind])), batch()
    b["unlabeled"]["strong"] = -b["unlabeled"]["weak"]
    outputs = method.student(b)
    targets, weights = method.targets(b, outputs)
    classes = targets if targets.ndim == 1 else targets.argmax(1)
    weak = method.network(b["unlabeled"]["weak"]).argmax(1)
    kept = weights > 0.0
    agreement = (classes == weak)[kept].float().mean()
    assert kept.any()
    assert agreement > 0.7  # alignment and debiasing move some


@each
def test_order_of_the_unlabeled_samples_does_not_matter(kind) -> None:
    first, second = (warm(build(kind, **METHODS[kind])) for _ in range(2))
    b, order = batch(), torch.randperm(12)
    permuted = {**b, "unlabeled": {k: v[order] for k, v in b["unlabeled"].items()}}
    torch.testing.assert_close(first.training_step(b, 0), second.training_step(permuted, 0))
    for name, value in first.policy.state_dict().items():
        torch.testing.assert_close(value, second.policy.state_dict()[name], msg=name)


@each
def test_state_of_the_policy_comes_back_into_a_fresh_method(kind) -> None:
    method = warm(build(kind, **METHODS[kind]))
    fresh = kind(network=network, num_classes=4, **METHODS[kind])
    fresh.configure_model()  # nobody tells it the unlabeled samples
    fresh.load_state_dict(method.state_dict())
    torch.manual_seed(0)
    expected = method.training_step(batch(), 0)
    torch.manual_seed(0)
    assert torch.equal(fresh.training_step(batch(), 0), expected)


@each
def test_the_teacher_may_label(kind) -> None:
    method = warm(build(kind, labeler="teacher", **METHODS[kind]))
    loss = method.training_step(batch(), 0)
    loss.backward()
    assert torch.isfinite(loss)


@each
def test_paper_defaults_build_and_default_views_are_named(kind) -> None:
    method = build(kind)
    assert kind.unlabeled_views == ("weak", "strong")
    assert kind.labeled_views == (("image", "strong") if kind is AdaMatch else ("image",))
    assert torch.isfinite(method.training_step(batch(), 0))


def test_uda_at_fixmatch_settings_is_fixmatch() -> None:
    uda = build(UDA, policy=partial(Threshold, threshold=0.95, temperature=1.0))
    fixmatch = build(FixMatch)
    losses = [m.training_step(batch(), 0) for m in (uda, fixmatch)]
    assert torch.equal(*losses)
    assert torch.equal(gradient(uda, losses[0]), gradient(fixmatch, losses[1]))


def test_policies_of_another_kind_are_refused() -> None:
    for kind in (FreeMatch, DebiasMatch):
        with pytest.raises(UserError, match=f"{kind.__name__}: policy=Threshold"):
            build(kind, policy=Threshold)


@pytest.mark.parametrize("warmup_steps", [2, 1])
def test_dash_says_so_where_the_run_ends_within_the_warm_up(tmp_path, warmup_steps) -> None:
    method = build(Dash, policy=partial(DynamicThreshold, warmup_steps=warmup_steps))
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(method, DataLoader([batch(1), batch(2)], batch_size=None))
    told = [str(warning.message) for warning in caught if "labels alone" in str(warning.message)]
    assert len(told) == (warmup_steps == 2)
    assert all("warmup_steps=2" in message for message in told)
