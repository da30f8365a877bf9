import pytest
import torch
from torch import nn

from zoo.core.errors import UserError
from zoo.core.parameters import parameter_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        self.head = nn.Linear(3, 2)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    net = Net()
    groups = parameter_groups(net, {"backbone": 0.1, "backbone.1": 0.5})
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    of = {id(p): g for g in groups for p in g["params"]}
    assert of[id(net.backbone[0].weight)]["lr_multiplier"] == 0.1
    assert of[id(net.backbone[1].weight)]["lr_multiplier"] == 0.5  # the longest match
    assert of[id(net.head.weight)]["lr_multiplier"] == 1.0
    assert of[id(net.head.bias)]["weight_decay"] == 0.0
    assert of[id(net.backbone[1].weight)]["weight_decay"] == 0.0
    assert "weight_decay" not in of[id(net.head.weight)]


def test_decay_everywhere_is_one_group_and_the_optimizer_takes_it() -> None:
    groups = parameter_groups(Net(), decay_norms_and_biases=True)
    assert len(groups) == 1
    assert torch.optim.AdamW(groups, weight_decay=0.1).param_groups[0]["weight_decay"] == 0.1


def test_a_multiplier_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match=r"begins with 'backbon'\. Did you mean 'backbone'"):
        parameter_groups(Net(), {"backbon": 0.1})
