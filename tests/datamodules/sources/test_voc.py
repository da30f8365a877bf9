"""VOC folders, on three images of 24 × 32 pixels."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from datamodules import VOC, SegmentationData


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Annotations"):
        (folder / name).mkdir(parents=True)
    # width 32, height 24: the middle square are columns 4 to 27
    shown = {"a": (3, "bird"), "b": (15, "person"), "c": (20, "tvmonitor")}
    for number, (name, (label, words)) in enumerate(shown.items()):
        mask = Image.new("P", (32, 24), 0)
        mask.putpalette([value for entry in range(256) for value in (entry, 255 - entry, 0)])
        mask.paste(label, (8, 6, 20, 18))
        mask.paste(255, (20, 6, 22, 18))
        mask.save(folder / "SegmentationClass" / f"{name}.png")
        Image.new("RGB", (32, 24), (80 * number, 40, 90)).save(folder / "JPEGImages" / f"{name}.jpg")
        objects = "".join(f"<object><name>{word}</name></object>" for word in (words, words))
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    (folder / "ImageSets/Segmentation/train.txt").write_text("a\nb.jpg b.png\n\n")
    (folder / "ImageSets/Segmentation/val.txt").write_text("/JPEGImages/c.jpg /SegmentationClass/c.png\n")
    return tmp_path


@pytest.mark.parametrize("tags_from", ["annotations", "masks"])
def test_images_tags_and_masks(root, tags_from):
    source = VOC(str(root), size=24, tags_from=tags_from)
    source.prepare()
    assert source.num_classes == 20
    batch = source.train()[[0, 1]]
    assert batch["image"].shape == (2, 3, 24, 24)
    assert batch["tags"].nonzero().tolist() == [[0, 2], [1, 14]]
    assert batch["mask"][0].unique().tolist() == [0, 3, 255]
    assert (batch["mask"][0] == 3).nonzero().min(0).values.tolist() == [6, 4]  # column 8 of the whole image
    assert source.test()[[0]]["tags"].nonzero().tolist() == [[0, 19]]
    assert source.train().subset(torch.tensor([1]))[[0]]["mask"].unique().tolist() == [0, 15, 255]


def test_training_from_tags_opens_no_mask(root):
    for name in "ab":
        (root / "VOCdevkit/VOC2012/SegmentationClass" / f"{name}.png").unlink()
    data = SegmentationData(VOC(str(root), size=24), batch_size=2, steps=1, val_size=0, eval_batch_size=1)
    data.setup("fit")
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader()))[0], 0)["weak"]
    assert set(batch) == {"image", "tags", "index"}
    held = data.on_after_batch_transfer(next(iter(data.test_dataloader()["test"])), 0)
    assert held["mask"].unique().tolist() == [0, 20, 255]


def test_what_is_missing_is_named(root):
    with pytest.raises(FileNotFoundError, match="JPEGImages"):
        VOC(str(root / "nowhere")).prepare()
    with pytest.raises(FileNotFoundError, match="Did you mean 'train'"):
        VOC(str(root), train_list="trian").prepare()
    (root / "VOCdevkit/VOC2012/Annotations/a.xml").write_text(
        "<annotation><object><name>brid</name></object></annotation>"
    )
    with pytest.raises(ValueError, match="Did you mean 'bird'"):
        VOC(str(root)).train()
    (root / "VOCdevkit/VOC2012/Annotations/a.xml").unlink()
    with pytest.raises(FileNotFoundError, match="tags_from: masks"):
        VOC(str(root)).train()


def test_short_name_in_yaml(root):
    """In a process of its own, that has imported nothing but what the command line imports."""
    source = f"{{class_path: VOC, init_args: {{root: {root}}}}}"
    program = f"""
import datamodules
from jsonargparse import ArgumentParser
parser = ArgumentParser()
parser.add_subclass_arguments(datamodules.Data, "data")
read = parser.parse_string("data: {{class_path: SegmentationData, init_args: {{source: {source}}}}}")
print(read.data.init_args.source.class_path, len(parser.instantiate(read).data.source.train()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["datamodules.VOC", "2"]
