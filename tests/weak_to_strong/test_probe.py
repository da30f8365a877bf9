import copy
from functools import partial

import torch

from zoo import NaiveWeakToStrong
from zoo.weak_to_strong.probe import Probe

PROBE = partial(Probe, backbone="resnet8_cifar", resize=16)


def counted(probe: Probe) -> list[int]:
    seen: list[int] = []
    compute = probe._compute
    probe._compute = lambda x: (seen.append(len(x)), compute(x))[1]
    return seen


def test_only_the_head_learns_and_the_backbone_stays_in_evaluation_mode() -> None:
    made = NaiveWeakToStrong(network=PROBE, num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.1))
    made.configure_model()
    before = copy.deepcopy(made.network.backbone.state_dict())
    made.train()
    optimizer = made.configure_optimizers()
    batch = {"weak": {"image": torch.randn(4, 1, 28, 28), "probabilities": torch.rand(4, 3).softmax(1)}}
    for _ in range(2):
        made.training_step(batch, 0).backward()
        optimizer.step()
    assert made.network.head.training
    assert not made.network.backbone.training
    assert all(torch.equal(v, before[k]) for k, v in made.network.backbone.state_dict().items())
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {
        "network.head.weight",
        "network.head.bias",
    }


def test_features_are_computed_once_and_come_back_equal() -> None:
    probe, x = PROBE(3), torch.randn(6, 1, 28, 28)
    seen = counted(probe)
    first = probe.features(x)
    assert torch.equal(probe.features(x[2:5].flip(0)), first[2:5].flip(0))
    mixed = probe.features(torch.cat([torch.randn(2, 1, 28, 28), x[:1]]))
    assert torch.equal(mixed[2:], first[:1])
    assert seen == [6, 2]


def test_the_store_is_bounded_and_not_in_a_checkpoint() -> None:
    probe, x = PROBE(3, cache_size=4), torch.randn(6, 1, 28, 28)
    seen = counted(probe)
    assert torch.equal(probe.features(x), probe.features(x))
    assert seen == [6, 2]
    assert len(probe.store) == 4
    assert set(probe.state_dict()) == set(PROBE(3).state_dict())


def test_normalisation_is_exchanged() -> None:
    probe = Probe(3, backbone="resnet8_cifar", mean=0.2, std=0.4)
    raw, seen = torch.rand(2, 3, 8, 8), []
    probe.backbone.features = lambda x: (seen.append(x), torch.zeros(2, probe.num_features))[1]
    probe.features((raw - 0.2) / 0.4)
    assert torch.allclose(seen[0], (raw - 0.5) / 0.5, atol=1e-6)
