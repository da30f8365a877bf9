import torch

from zoo.core.affine import Affines


def test_affine_layers_are_the_identity_of_what_is_positive() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(Affines((4,), 3)(x), x.relu())
    assert torch.equal(Affines((4,), 1)(x), x)
    assert sum(p.numel() for p in Affines((512,), 10).parameters()) == 10_240
