import torch

from zoo.losses.cutmix import blend, boxes, cutmix


def test_blend_by_hand() -> None:
    x, other = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert blend(x, other, torch.tensor([0.25, 1.0])).mean(dim=(1, 2, 3)).tolist() == [0.25, 1.0]


def test_boxes_are_boxes_of_the_asked_area_where_the_border_does_not_cut_them() -> None:
    share = torch.full((400,), 0.75)
    masks = boxes(share, 400, 16, 24)
    assert masks.shape == (400, 1, 16, 24)
    areas = masks.sum(dim=(1, 2, 3))
    assert areas.max() == 8 * 12  # half of each side
    assert areas.min() >= 4 * 6  # a quarter of it where the centre lies in a corner
    rows, columns = masks.any(3)[:, 0], masks.any(2)[:, 0]
    assert torch.equal(rows.unsqueeze(2) & columns.unsqueeze(1), masks[:, 0]), "a box is the product of its sides"
    assert ((rows[:, 1:] != rows[:, :-1]).sum(1) <= 2).all()
    assert len(areas.unique()) > 5


def test_cutmix_returns_the_share_that_is_left() -> None:
    x, other = torch.zeros(50, 2, 9, 9), torch.ones(50, 2, 9, 9)
    mixed, share = cutmix(x, other, torch.rand(50))
    assert set(mixed.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), 1 - share)
    whole, share = cutmix(x, other, torch.ones(50))
    assert torch.equal(whole, x)
    assert share.tolist() == [1.0] * 50


def test_one_share_gives_one_box() -> None:
    masks = boxes(torch.tensor([0.5]), 6, 12, 12)
    assert masks.shape == (6, 1, 12, 12)
    assert (masks == masks[:1]).all()


def test_draws_come_from_the_default_generator() -> None:
    torch.manual_seed(3)
    first = boxes(torch.full((4,), 0.5), 4, 8, 8)
    torch.manual_seed(3)
    assert torch.equal(first, boxes(torch.full((4,), 0.5), 4, 8, 8))
