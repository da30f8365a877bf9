"""Whose statistics BatchNorm remembers where the domains are passed one by one."""

from functools import partial

import pytest
import torch
from torch import nn

from zoo import CST, DAN, MCC, FixMatchAdaptation, Network, SelfEnsembling
from zoo.core.backbones import Backbone
from zoo.core.errors import UserError

METHODS = [DAN, MCC, FixMatchAdaptation, SelfEnsembling, CST]


class Normed(Backbone):
    """Features that BatchNorm alone makes."""

    num_features = 4
    in_channels = 1

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(4, momentum=0.5))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.flatten(1))


def method(cls, **arguments):
    torch.manual_seed(0)
    network = partial(Network, backbone="tiny_mlp", in_channels=1)
    made = cls(network=network, num_classes=3, forward_pass="split", **arguments)
    made.configure_model()
    made.network.backbone = Normed()
    made.network.head = nn.Linear(4, 3)
    if cls is SelfEnsembling:
        made.teacher.module.backbone, made.teacher.module.head = Normed(), nn.Linear(4, 3)
    return made.train()


def batch():
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(6, 1, 2, 2, generator=generator)
    target = 5 + torch.randn(8, 1, 2, 2, generator=generator)
    views = dict.fromkeys(("image", "weak", "weak_2", "strong"), target)
    return {"source": {"image": source, "label": torch.tensor([0, 1, 2] * 2)}, "target": views}


@pytest.mark.parametrize("cls", METHODS)
def test_of_the_target_alone(cls) -> None:
    made, given = method(cls, running_statistics="target"), batch()
    made.training_step(given, 0)
    norm, passes = made.network.backbone.model, made.network.backbone.model.num_batches_tracked
    mean = given["target"]["weak"].flatten(1).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, (1 - 0.5**passes) * mean)  # of every pass, and of nothing else


@pytest.mark.parametrize("cls", METHODS)
def test_both_pass_alike_but_for_what_is_remembered(cls) -> None:
    losses = [method(cls, running_statistics=whose).training_step(batch(), 0) for whose in ("both", "target")]
    assert torch.equal(*losses)


def test_layers_remember_again_after_the_source_has_passed() -> None:
    made = method(MCC, running_statistics="target")
    made.training_step(batch(), 0)
    assert made.network.backbone.model.track_running_stats


def test_a_joint_pass_is_refused() -> None:
    with pytest.raises(UserError, match="needs forward_pass='split'"):
        MCC(network=partial(Network, backbone="tiny_mlp", in_channels=1), num_classes=3, running_statistics="target")
    with pytest.raises(UserError, match=r"running_statistics='targt' must be .*Did you mean 'target'"):
        MCC(
            network=partial(Network, backbone="tiny_mlp", in_channels=1),
            num_classes=3,
            forward_pass="split",
            running_statistics="targt",
        )
