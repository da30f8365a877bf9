"""Scenes, paired views and the batches of the segmentation regime."""

import pytest
import torch

from datamodules.segmentation import PairView, SegmentationData
from datamodules.sources.digit_scenes import DigitScenes, tags_of


@pytest.fixture(scope="module")
def scenes():
    return DigitScenes(train_scenes=40, test_scenes=12, size=48)


def test_scenes_carry_what_they_say(scenes):
    batch = scenes.train()[list(range(40))]
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].shape == (40, 3, 48, 48)
    assert batch["mask"].shape == (40, 48, 48)
    assert batch["mask"].max() <= 10
    assert batch["tags"].shape == (40, 10)
    assert (batch["label"] == -1).all()
    torch.testing.assert_close(batch["tags"], tags_of(batch["mask"], 10, min_pixels=20))
    per_image = batch["tags"].sum(1)
    assert per_image.min() >= 1
    assert per_image.max() <= 3
    assert len(per_image.unique()) == 3
    covered = (batch["mask"] > 0).float().mean()
    assert 0.05 < covered < 0.3


def test_scenes_follow_their_seed_and_fewer_are_the_first_of_more(scenes):
    again, other = DigitScenes(7, 5, size=48), DigitScenes(7, 5, size=48, seed=1)
    few = scenes.train()[list(range(7))]
    assert torch.equal(again.train()[list(range(7))]["image"], few["image"])
    assert torch.equal(again.train()[list(range(7))]["mask"], few["mask"])
    assert not torch.equal(other.train()[list(range(7))]["image"], few["image"])
    assert not torch.equal(again.test()[[0]]["image"], few["image"][:1])
    assert again.train() is again.train()


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    DigitScenes(3, 3, size=32).train()
    assert torch.equal(torch.rand(2), expected)


def test_max_digits_one_gives_one_digit():
    assert (DigitScenes(20, 2, size=32, max_digits=1).train()[list(range(20))]["tags"].sum(1) == 1).all()


@pytest.mark.parametrize(
    "arguments", [{"size": 8}, {"max_digits": 11}, {"scale": (0.5, 0.2)}, {"train_scenes": 0}, {"digit_texture": 2.0}]
)
def test_scenes_refuse(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"DigitScenes: {name}="):
        DigitScenes(**arguments)


def test_tags_of_a_mask():
    masks = torch.tensor([[[0, 1, 1], [3, 255, 1]], [[0, 0, 0], [0, 0, 255]]])
    assert tags_of(masks, 4).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert tags_of(masks, 4, min_pixels=2).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "arguments", [{"shift": 0.25}, {"shift": 0.25, "flip": True}, {"shift": 0.0, "scale": (2.0, 2.0)}]
)
def test_image_and_mask_move_together(arguments):
    torch.manual_seed(0)
    # blocks of 4 pixels: the mask is what the image shows
    blocks = torch.randint(0, 20, (16, 8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    image = (blocks * 10).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    moved, mask = PairView(**arguments)(image, blocks.to(torch.uint8))
    assert moved.shape == image.shape
    assert mask.dtype == torch.uint8
    inside = mask != 255
    agree = (moved[:, 0].int() - mask.int() * 10).abs() <= 1
    if "scale" in arguments:  # edges of blocks are blended: (6/8)² of the pixels are not
        assert agree[inside].float().mean() > 0.5
    else:
        assert agree[inside].all()
        assert (~inside).any()
    assert not torch.equal(moved, image)


def test_no_motion_is_no_change():
    image, mask = torch.randint(0, 256, (4, 3, 9, 12), dtype=torch.uint8), torch.randint(0, 9, (4, 9, 12))
    moved, same = PairView(shift=0.0)(image, mask)
    assert torch.equal(moved, image)
    assert torch.equal(same, mask)


def test_a_flip_mirrors_half_of_the_samples():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (200, 1, 4, 6), dtype=torch.uint8)
    moved, none = PairView(shift=0.0, flip=True)(image)
    assert none is None
    mirrored = (moved == image.flip(-1)).flatten(1).all(1)
    kept = (moved == image).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 60 < mirrored.sum() < 140


@pytest.mark.parametrize("arguments", [{"shift": 2.0}, {"scale": (0.0, 1.0)}])
def test_view_refuses(arguments):
    with pytest.raises(ValueError, match=f"PairView: {next(iter(arguments))}="):
        PairView(**arguments)


def test_batches(scenes):
    data = SegmentationData(scenes, batch_size=8, steps=2, val_size=10, eval_batch_size=10)
    assert data.num_classes == 10
    data.prepare_data()
    data.setup("fit")
    assert not set(data.split["weak"].tolist()) & set(data.split["val"].tolist())
    assert len(data.split["val"]) == 10
    assert not data.view.flip
    raw = next(iter(data.train_dataloader()))[0]
    batch = data.on_after_batch_transfer(raw, 0)["weak"]
    assert set(batch) == {"image", "tags", "index", "hidden_mask"}
    assert batch["image"].dtype == torch.float32
    assert batch["hidden_mask"].dtype == torch.int64
    torch.testing.assert_close(batch["tags"], scenes.train()[batch["index"].tolist()]["tags"])
    held = data.on_after_batch_transfer(next(iter(data.val_dataloader()["val"])), 0)
    assert {"image", "tags", "mask", "index"} <= set(held)
    assert held["mask"].dtype == torch.int64
    assert held["image"].shape == (10, 3, 48, 48)


def test_the_same_step_shows_the_same_view(scenes):
    def first():
        data = SegmentationData(scenes, batch_size=8, steps=2, val_size=10)
        data.setup("fit")
        return data.on_after_batch_transfer(next(iter(data.train_dataloader()))[0], 0)["weak"]["image"]

    assert torch.equal(first(), first())


def test_refuses_a_source_without_tags():
    from datamodules.sources import Blobs

    with pytest.raises(ValueError, match="has no tags"):
        SegmentationData(Blobs()).setup("fit")


def test_refuses_to_hold_everything_out(scenes):
    with pytest.raises(ValueError, match="val_size=40"):
        SegmentationData(scenes, val_size=40).setup("fit")
