import pytest
import torch

from zoo.core.errors import UserError
from zoo.losses import quarter_turns


@pytest.mark.parametrize("count", [1, 4, 6, 8])
def test_every_image_is_turned_as_often_as_its_label_says(count) -> None:
    images = torch.randn(count, 2, 5, 5)
    turned, turns = quarter_turns(images)
    assert turned.shape == images.shape
    for image, result, label in zip(images, turned, turns.tolist(), strict=True):
        assert torch.equal(result, torch.rot90(image, label, (1, 2)))


def test_quarters_are_as_even_as_can_be() -> None:
    assert quarter_turns(torch.randn(6, 1, 2, 2))[1].bincount(minlength=4).tolist() == [2, 2, 1, 1]


def test_direction_is_counter_clockwise() -> None:
    image = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(4, 1, 2, 2)  # a dot, top right
    turned, _ = quarter_turns(image)
    assert [tuple((t[0] == 1).nonzero()[0].tolist()) for t in turned] == [(0, 1), (0, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize("shape", [(4, 1, 2, 3), (4, 7)])
def test_what_cannot_be_turned_is_refused(shape) -> None:
    with pytest.raises(UserError, match="not square"):
        quarter_turns(torch.zeros(shape))
