import pytest
from torch import nn

from zoo.core.modes import evaluating


def test_every_part_gets_its_own_mode_back() -> None:
    one, two = nn.Sequential(nn.Dropout(), nn.Identity()), nn.Identity()
    one[0].eval()

    def within() -> None:
        with evaluating(one, two):
            assert not any(part.training for module in (one, two) for part in module.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        within()
    assert one.training
    assert not one[0].training
    assert one[1].training
    assert two.training
