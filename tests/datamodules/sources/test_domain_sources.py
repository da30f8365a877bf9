"""Every layout that a set with domains is passed on in, written small; and what is wrong about one is said."""

import bz2
import struct
import time

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules.sources import (
    MNIST,
    MNISTM,
    PACS,
    USPS,
    VLCS,
    WILDS,
    BlendedDigits,
    Blobs,
    DomainFolders,
    DomainLists,
    DomainNet,
    DomainNet126,
    FileList,
    ImageFolder,
    MissingData,
    Office31,
    OfficeHome,
    Source,
    TensorSamples,
    TerraIncognita,
    VisDA2017,
)
from datamodules.sources.arrays import ArraySource
from zoo.core.errors import UserError

FILES = ("a photo.jpg", "b.PNG", "c.png", "d.Jpeg")  # with a space; RGBA; palette; grey


def pictures(folder, colour=128):
    """Four images of one colour, each of another kind, in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, mode in zip(FILES, ("RGB", "RGBA", "P", "L"), strict=True):
        fill = {"RGB": (colour, 0, 0), "RGBA": (colour, 0, 0, 255), "P": colour, "L": colour}[mode]
        kind = "PNG" if name.lower().endswith("png") else "JPEG"
        Image.new(mode, (12, 10), fill).save(folder / name, format=kind)


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{path} {label}\n" for path, label in rows))


def listed(base, folder, labels, files=FILES):
    """Rows of a list: every image of every class, paths relative to ``base``."""
    return [(f"{folder}/{name}/{file}", label) for name, label in labels.items() for file in files]


def read(source, train, test):
    """The source is whole: its images can be read, its parts have these sizes; quickly."""
    start = time.process_time()
    source.prepare()
    samples, held = source.train(), source.test()
    assert (len(samples), len(held)) == (train, test)
    batch = samples[list(range(len(samples)))]
    assert batch["image"].shape == (train, 3, source.size, source.size)
    assert time.process_time() - start < 1
    for path, label in zip(samples.paths, samples.labels.tolist(), strict=True):
        assert f"/{source.classes[label]}/" in path  # the label is that of the folder, whatever the lists' numbers
    return samples


# Any tree, any list --------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    for domain in ("photo", "line art"):
        for number, name in enumerate(("ant", "bee", "cow")):
            pictures(tmp_path / domain / name, 40 * number)
    return tmp_path


def test_a_folder_per_domain(tree):
    source = DomainFolders(str(tree), "line art", size=8)
    samples = read(source, 12, 12)
    assert source.classes == ("ant", "bee", "cow")
    assert source.name == "DomainFolders (line art)"
    assert torch.bincount(samples.labels).tolist() == [4, 4, 4]
    held = DomainFolders(str(tree), "photo", size=8, protocol="holdout", test_fraction=0.25)
    assert torch.bincount(read(held, 9, 3).labels).tolist() == [3, 3, 3]
    assert not set(held.train().paths) & set(held.test().paths)


def test_class_folders_may_lie_deeper_and_be_divided(tmp_path):
    for name in ("ant", "bee"):
        pictures(tmp_path / "amazon" / "images" / name)
        pictures(tmp_path / "web" / "train" / name)
        pictures(tmp_path / "web" / "val" / name)
    read(DomainFolders(str(tmp_path), "amazon", size=8), 8, 8)
    read(DomainFolders(str(tmp_path), "web", size=8, protocol="holdout"), 8, 8)
    both = DomainFolders(str(tmp_path), "web", size=8)
    read(both, 16, 16)
    assert sorted(both.train().paths) == sorted(both.test().paths)


def test_classes_can_be_given_an_order(tree):
    source = DomainFolders(str(tree), "photo", size=8, classes=("cow", "bee", "ant", "dog"))
    read(source, 12, 12)
    assert torch.bincount(source.train().labels, minlength=4).tolist() == [4, 4, 4, 0]
    with pytest.raises(UserError, match="'cow' is none of the classes given"):
        _ = DomainFolders(str(tree), "photo", classes=("ant", "bee")).classes
    with pytest.raises(UserError, match="each once"):
        DomainFolders(str(tree), "photo", classes=("ant", "ant"))


def test_a_domain_without_labels(tmp_path):
    pictures(tmp_path / "mine")
    source = DomainFolders(str(tmp_path), "mine", size=8, protocol="holdout")
    source.prepare()
    assert source.classes == ()
    assert source.train().labels.tolist() == [-1] * 4
    assert len(source.test()) == 4


def test_a_wrong_root_or_domain_shows_the_tree(tree):
    with pytest.raises(MissingData) as error:
        DomainFolders(str(tree), "phto").prepare()
    message = str(error.value)
    assert "has no folder of the domain 'phto'. Did you mean 'photo'?" in message
    assert f"{tree}/phto/CLASS/*.jpg" in message
    assert "holds line art/, photo/" in message
    with pytest.raises(MissingData, match="does not exist"):
        DomainFolders(str(tree / "nowhere"), "photo").prepare()
    (tree / "empty" / "ant").mkdir(parents=True)
    with pytest.raises(MissingData, match="has no images of the domain 'empty'"):
        DomainFolders(str(tree), "empty").prepare()
    with pytest.raises(UserError, match=r"protocol='hold-out' must be .* Did you mean 'holdout'"):
        DomainFolders(str(tree), "photo", protocol="hold-out")


@pytest.mark.parametrize("first", [0, 1, 5])
def test_lists_are_named_by_their_folders(tree, first):
    labels = {"cow": first, "ant": first + 1, "bee": first + 2}
    write(tree / "image_list" / "photo.txt", listed(tree, "photo", labels))
    source = DomainLists(str(tree), "photo", size=8)
    read(source, 12, 12)
    assert source.classes == ("cow", "ant", "bee")


def test_lists_of_numbers_have_to_count_from_0_or_say_from_where(tmp_path):
    pictures(tmp_path / "photo")
    rows = [(f"photo/{file}", 1 + number % 3) for number, file in enumerate(FILES)]
    write(tmp_path / "image_list" / "photo.txt", rows)

    def source(**kwargs):
        return DomainLists(str(tmp_path), "photo", size=8, **kwargs)

    with pytest.raises(UserError, match=r"labels .* run from 1 to 3. If they count from 1, say first_label: 1"):
        source().prepare()
    with pytest.raises(UserError, match="run from 1 to 3"):
        source(classes=("a", "b", "c")).prepare()
    assert source(first_label=1).train().labels.tolist() == [0, 1, 2, 0]
    assert source(first_label=1).classes == ("0", "1", "2")
    assert source(first_label=1, classes=("a", "b", "c")).classes == ("a", "b", "c")
    assert source(first_label=0).train().labels.tolist() == [1, 2, 3, 1]
    with pytest.raises(UserError, match=r"label 3 .* is none of the 2 classes"):
        source(first_label=1, classes=("a", "b")).prepare()
    with pytest.raises(UserError, match="run from 1 to 3"):
        FileList(str(tmp_path / "image_list" / "photo.txt"), root=str(tmp_path)).prepare()
    with pytest.raises(UserError, match="a list that counts from 1 says first_label: 1"):
        FileList(str(tmp_path / "image_list" / "photo.txt"), classes=("a", "b", "c")).prepare()


def test_lists_that_contradict_the_classes_given(tree):
    write(tree / "image_list" / "photo.txt", listed(tree, "photo", {"ant": 0, "bee": 1, "cow": 2}))
    with pytest.raises(
        UserError, match=r"'photo/ant/a photo.jpg' has the label 0, which is 'bee' where first_label is"
    ):
        DomainLists(str(tree), "photo", classes=("bee", "ant", "cow")).prepare()


def test_lists_with_a_test_part_words_and_unlabelled_rows(tree):
    write(tree / "photo_train.txt", listed(tree, "photo", {"ant": "ant", "bee": "bee"}))
    write(tree / "photo_test.txt", listed(tree, "photo", {"cow": "cow"}))
    lists = {"list_file": "{domain}_train.txt", "test_list": "{domain}_test.txt", "size": 8}
    read(DomainLists(str(tree), "photo", protocol="holdout", **lists), 8, 4)
    read(DomainLists(str(tree), "photo", **lists), 12, 12)
    with pytest.raises(MissingData, match=r"has no list phot_train.txt. Did you mean 'photo'"):
        DomainLists(str(tree), "phot", **lists).prepare()
    write(tree / "image_list" / "photo.txt", listed(tree, "photo", {"ant": 0, "bee": 1, "cow": -1}))
    source = DomainLists(str(tree), "photo", size=8)
    assert source.classes == ("ant", "bee")
    assert source.train().labels.tolist() == [0] * 4 + [1] * 4 + [-1] * 4
    write(tree / "image_list" / "photo.txt", [("photo/ant/none.jpg", 0)])
    with pytest.raises(UserError, match=r"cannot read the image '.*none.jpg'.* 1 of 1"):
        DomainLists(str(tree), "photo").prepare()


def test_pictures_of_every_kind_become_colour(tree):
    samples = DomainFolders(str(tree), "photo", size=4).train()
    images = samples[[0, 1, 3]]["image"][:, :, 0, 0]  # black in RGB, RGBA and grey
    assert images.float().max() < 6


def test_a_class_called_train(tmp_path):
    for name in ("car", "train"):
        pictures(tmp_path / name)
    assert ImageFolder(str(tmp_path)).classes == ("car", "train")


# The named sets ------------------------------------------------------------------------------------------------------

SOME = {"back_pack": 0, "bike": 1, "trash_can": 30}


def office31(root):
    for domain in ("amazon", "webcam"):
        for name in SOME:
            pictures(root / domain / "images" / name)


def test_office31_as_tllib_has_it(tmp_path):
    office31(tmp_path)
    write(tmp_path / "image_list" / "amazon.txt", listed(tmp_path, "amazon/images", SOME))
    source = Office31(str(tmp_path), "A", size=8)
    assert source.name == "Office31 (amazon)"
    assert source.num_classes == 31
    assert read(source, 12, 12).labels.unique().tolist() == [0, 1, 30]
    # no list of this one: its folders
    assert read(Office31(str(tmp_path), "webcam", size=8), 12, 12).labels.unique().tolist() == [0, 1, 30]
    assert read(Office31(str(tmp_path), "webcam", size=8, protocol="holdout"), 10, 2) is not None


def test_office31_as_pytorch_adapt_has_it(tmp_path):
    office31(tmp_path / "office31")
    rows = listed(tmp_path, "amazon/images", SOME)
    write(tmp_path / "office31" / "amazon_train.txt", rows[:8])
    write(tmp_path / "office31" / "amazon_test.txt", rows[8:])
    read(Office31(str(tmp_path), "amazon", size=8, protocol="holdout"), 8, 4)
    read(Office31(str(tmp_path), "amazon", size=8), 12, 12)
    (tmp_path / "office31" / "amazon_test.txt").unlink()
    with pytest.raises(MissingData, match=r"there is .*amazon_train.txt, but no .*amazon_test.txt"):
        Office31(str(tmp_path), "amazon").prepare()


@pytest.mark.parametrize("fourth", ["Real World", "Real_World", "RealWorld", "real"])
def test_office_home_spells_its_fourth_domain_in_three_ways(tmp_path, fourth):
    pictures(tmp_path / "OfficeHomeDataset_10072016" / fourth / "Alarm_Clock")
    pictures(tmp_path / "OfficeHomeDataset_10072016" / fourth / "Drill")
    for asked in ("Real World", "real_world", "Rw"):
        read(OfficeHome(str(tmp_path), asked, size=8), 8, 8)


def test_office_home_lists_of_another_order_and_spelling(tmp_path):
    pictures(tmp_path / "Real World" / "Alarm_Clock")
    pictures(tmp_path / "Real World" / "Drill")
    write(tmp_path / "image_list" / "Real_World.txt", listed(tmp_path, "Real_World", {"Drill": 0, "Alarm_Clock": 33}))
    alphabetical = OfficeHome(str(tmp_path), "Real World", size=8)
    assert read(alphabetical, 8, 8).labels.unique().tolist() == [0, 16]
    tllib = OfficeHome(str(tmp_path), "Real World", size=8, class_order="tllib")
    assert read(tllib, 8, 8).labels.unique().tolist() == [0, 33]
    assert sorted(tllib.classes) == sorted(alphabetical.classes)
    with pytest.raises(UserError, match="class_order='alphabetic' must be"):
        OfficeHome(str(tmp_path), "Art", class_order="alphabetic")
    write(tmp_path / "image_list" / "Real_World.txt", [("Real_World/a.jpg", 0)])
    with pytest.raises(UserError, match="lies in no folder of a class"):
        OfficeHome(str(tmp_path), "Real World").prepare()


def test_office_home_as_pytorch_adapt_has_it(tmp_path):
    base = tmp_path / "officehome"
    pictures(base / "art" / "Bed")
    write(base / "art_train.txt", listed(base, "art", {"Bed": 3})[:3])
    write(base / "art_test.txt", listed(base, "art", {"Bed": 3})[3:])
    read(OfficeHome(str(tmp_path), "Art", size=8, protocol="holdout"), 3, 1)


@pytest.mark.parametrize("folder", ["", "image_list/"])
def test_domainnet_follows_its_lists(tmp_path, folder):
    labels = {"teddy-bear": 1, "The_Mona_Lisa": 2, "aircraft_carrier": 0}
    for name in labels:
        pictures(tmp_path / "clipart" / name)
    rows = listed(tmp_path, "clipart", labels)
    write(tmp_path / f"{folder}clipart_train.txt", [row for row in rows if "b.PNG" not in row[0]])
    write(tmp_path / f"{folder}clipart_test.txt", [row for row in rows if "b.PNG" in row[0]])
    source = DomainNet(str(tmp_path), "clipart", size=8)
    read(source, 9, 3)
    assert source.classes == (
        "aircraft_carrier",
        "teddy-bear",
        "The_Mona_Lisa",
    )  # as the official numbers, not as ASCII
    assert source.test().paths[0].endswith("teddy-bear/b.PNG")
    read(DomainNet(str(tmp_path), "c", size=8, protocol="transductive"), 12, 12)


def test_domainnet_without_lists_and_its_126_classes(tmp_path):
    for name in ("apple", "zebra"):
        pictures(tmp_path / "domain_net" / "real" / name)
    read(DomainNet(str(tmp_path), "real", size=8), 6, 2)
    with pytest.raises(MissingData, match=r"real126_train.txt and real126_test.txt"):
        DomainNet126(str(tmp_path), "real").prepare()
    rows = listed(tmp_path, "real", {"zebra": 0})
    write(tmp_path / "domain_net" / "real126_train.txt", rows[:3])
    write(tmp_path / "domain_net" / "real126_test.txt", rows[3:])
    read(DomainNet126(str(tmp_path), "real", size=8), 3, 1)
    write(tmp_path / "domain_net" / "real_list.txt", rows)
    assert DomainNet126(str(tmp_path), "real", size=8, protocol="transductive").classes == ("zebra",)


@pytest.mark.parametrize("how", ["folders", "official", "tllib"])
def test_visda_has_a_class_called_train(tmp_path, how):
    labels = {"aeroplane": 0, "train": 10, "truck": 11}
    for domain in ("train", "validation"):
        for name in labels:
            pictures(tmp_path / "VISDA-C" / domain / name)
    base = tmp_path / "VISDA-C"
    if how == "official":
        write(base / "train" / "image_list.txt", [(path[2:], n) for path, n in listed(base, ".", labels)])
    if how == "tllib":
        write(base / "image_list" / "train.txt", listed(base, "train", labels))
    assert read(VisDA2017(str(tmp_path), "synthetic", size=8), 12, 12).labels.unique().tolist() == [0, 10, 11]
    assert read(VisDA2017(str(base), "validation", size=8), 12, 12).labels.unique().tolist() == [0, 10, 11]


def test_visda_test_images_lie_in_no_class_folder(tmp_path):
    pictures(tmp_path / "test" / "trunk00")
    write(tmp_path / "test" / "image_list.txt", [(f"trunk00/{file}", 11) for file in FILES])
    assert VisDA2017(str(tmp_path), "test", size=8).train().labels.tolist() == [11] * 4
    write(tmp_path / "test" / "image_list.txt", [(f"trunk00/{file}", 12) for file in FILES])
    with pytest.raises(UserError, match="the label '12', and neither is one of the 12 classes"):
        VisDA2017(str(tmp_path), "test").prepare()


def test_pacs_lists_count_from_1(tmp_path):
    labels = {"dog": 1, "elephant": 2, "person": 7}
    for name in labels:
        pictures(tmp_path / "kfold" / "art_painting" / name)
    read(PACS(str(tmp_path), "A", size=8), 12, 12)
    rows = listed(tmp_path, "art_painting", labels)
    write(tmp_path / "art_painting_train_kfold.txt", rows[:9])
    write(tmp_path / "art_painting_crossval_kfold.txt", rows[9:])
    write(tmp_path / "art_painting_test_kfold.txt", rows)
    assert read(PACS(str(tmp_path), "art_painting", size=8), 12, 12).labels.unique().tolist() == [0, 1, 6]
    read(PACS(str(tmp_path), "art_painting", size=8, protocol="holdout"), 9, 3)


@pytest.mark.parametrize("first", [0, 1])  # the official numbers, and those of lists that were made anew
def test_pacs_lists_of_tllib(tmp_path, first):
    labels = {"dog": first, "giraffe": first + 2}
    for name in labels:
        pictures(tmp_path / "sketch" / name)
    rows = listed(tmp_path, "sketch", labels)
    for part, chosen in (("all", rows), ("train", rows[:6]), ("val", rows[6:])):
        write(tmp_path / "image_list" / f"sketch_{part}.txt", chosen)
    assert read(PACS(str(tmp_path), "sketch", size=8), 8, 8).labels.unique().tolist() == [0, 2]
    read(PACS(str(tmp_path), "sketch", size=8, protocol="holdout"), 6, 2)
    write(tmp_path / "image_list" / "sketch_all.txt", [*rows, ("sketch/dog/b.PNG", first + 2)])
    with pytest.raises(UserError, match=rf"the label {first + 2} to 'giraffe' and, with 'sketch/dog/b.PNG', to 'dog'"):
        PACS(str(tmp_path), "sketch").prepare()


def test_vlcs_and_terra_incognita(tmp_path):
    for name in VLCS.names:
        pictures(tmp_path / "VLCS" / "VOC2007" / name)
    for name in TerraIncognita.names:
        pictures(tmp_path / "terra_incognita" / "location_38" / name)
    read(VLCS(str(tmp_path), "V", size=8), 20, 20)
    read(TerraIncognita(str(tmp_path), "L38", size=8), 40, 40)


def test_vlcs_with_numbers_for_folders(tmp_path):
    for part in ("train", "crossval", "test", "full"):
        for number in range(5):
            pictures(tmp_path / "VLCS" / "PASCAL" / part / str(number))
    whole, held = VLCS(str(tmp_path), "V", size=8), VLCS(str(tmp_path), "VOC2007", size=8, protocol="holdout")
    assert whole.classes == ("bird", "car", "chair", "dog", "person")
    assert len(whole.train()) == len(whole.test()) == 60  # the copies in `full` are not counted twice
    assert (len(held.train()), len(held.test())) == (40, 20)
    for path, label in zip(whole.train().paths, whole.train().labels.tolist(), strict=True):
        assert f"/{label}/" in path
    pictures(tmp_path / "VLCS" / "PASCAL" / "train" / "5")
    with pytest.raises(UserError, match="the folder '5', which is none of the 5 classes"):
        VLCS(str(tmp_path), "V").prepare()


def test_what_is_for_validation_beside_a_test_is_trained_on(tmp_path):
    for part in ("train", "val", "test"):
        pictures(tmp_path / "web" / part / "ant")
        pictures(tmp_path / "web" / part / "bee")
    read(DomainFolders(str(tmp_path), "web", size=8, protocol="holdout"), 16, 8)
    read(DomainFolders(str(tmp_path), "web", size=8), 24, 24)


def test_named_sets_say_what_they_look_for(tmp_path):
    pictures(tmp_path / "other" / "dog")
    with pytest.raises(MissingData) as error:
        PACS(str(tmp_path), "photo").prepare()
    for line in ("photo/dog/*", "image_list/photo_all.txt", "photo_train_kfold.txt", "holds other/"):
        assert line in str(error.value)
    with pytest.raises(UserError, match=r"domain='catoon' must be one of .* Did you mean 'cartoon'"):
        PACS(str(tmp_path), "catoon")
    pictures(tmp_path / "photo" / "zebra")
    with pytest.raises(UserError, match="lies in the folder 'zebra', which is none of the 7 classes"):
        PACS(str(tmp_path), "photo").prepare()


def test_configs_can_name_them(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--source", type=Source)
    init = {"root": str(tmp_path), "domain": "Art", "class_order": "tllib", "skip_broken": True, "flip": False}
    parsed = parser.parse_object({"source": {"class_path": "OfficeHome", "init_args": init}})
    source = parser.instantiate_classes(parsed).source
    assert (source.class_order, source.skip_broken, source.flip) == ("tllib", True, False)


# Digits --------------------------------------------------------------------------------------------------------------


def test_mnist_m_in_its_layout(tmp_path):
    for part, number in (("train", 5), ("test", 3)):
        folder = tmp_path / "mnist_m" / f"mnist_m_{part}"
        folder.mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (32, 32), (i, 7, 9)).save(folder / f"{i:08}.png")
        write(tmp_path / "mnist_m" / f"mnist_m_{part}_labels.txt", [(f"{i:08}.png", 9 - i) for i in range(number)])
    source = MNISTM(str(tmp_path))
    source.prepare()
    assert source.train().labels.tolist() == [9, 8, 7, 6, 5]
    assert source.test().images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert MNISTM(str(tmp_path / "mnist_m"), size=28).test().images.shape == (3, 3, 28, 28)
    (tmp_path / "mnist_m" / "mnist_m_test_labels.txt").unlink()
    with pytest.raises(MissingData, match=r"has not the test part(.|\n)*mnist_m_test_labels.txt(.|\n)*holds mnist_m/"):
        source.prepare()


def digits(images):
    return ArraySource(10, images=images, labels=torch.arange(len(images)) % 10, size=6)


def test_blended_digits_are_the_difference_to_a_patch(tmp_path):
    (tmp_path / "photos").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "photos" / "one.png")
    images = torch.zeros(40, 1, 6, 6, dtype=torch.uint8)
    images[1] = 255
    images[2] = torch.randint(0, 256, (1, 6, 6), dtype=torch.uint8)
    source = BlendedDigits(digits(images), str(tmp_path / "photos"))
    source.prepare()
    train = source.train()
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    windows = pixels.unfold(1, 6, 1).unfold(2, 6, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)

    def is_patch(image):
        return bool((windows == image).flatten(1).all(dim=1).any())

    assert is_patch(train.images[0])  # |p - 0|
    assert is_patch(255 - train.images[1])  # |p - 255|
    differences = (windows.int() - images[2].int()).abs()
    assert bool((differences == train.images[2].int()).flatten(1).all(dim=1).any())
    assert not is_patch(255 - train.images[3])
    assert len(train.images[3:].flatten(1).unique(dim=0)) > 10  # patches from many places
    assert torch.equal(source.train().images, train.images)
    assert not torch.equal(BlendedDigits(digits(images), str(tmp_path / "photos"), seed=1).train().images, train.images)
    assert (source.channels, train.images.shape[1]) == (3, 3)
    assert str(tmp_path / "photos") in source.name


def test_blended_digits_name_their_photographs_and_refuse_others(tmp_path):
    images = torch.zeros(5, 1, 6, 6, dtype=torch.uint8)
    source = BlendedDigits(digits(images))
    assert "two photographs of scikit-learn" in source.name
    assert source.train().images.float().std() > 10
    with pytest.raises(MissingData, match="holds no photographs"):
        BlendedDigits(digits(images), str(tmp_path)).prepare()
    Image.new("RGB", (5, 50)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="is smaller than a digit of 6 pixels"):
        BlendedDigits(digits(images), str(tmp_path)).prepare()
    with pytest.raises(UserError, match="has 3 channels; digits have to be grey"):
        BlendedDigits(Blobs(channels=3))


def test_usps_and_mnist_in_torchvisions_layouts(tmp_path):
    for file, number in (("usps.bz2", 4), ("usps.t.bz2", 2)):
        rows = [f"{1 + n} " + " ".join(f"{i + 1}:{-1 if i else 1}" for i in range(256)) for n in range(number)]
        (tmp_path / file).write_bytes(bz2.compress("\n".join(rows).encode()))
    source = USPS(str(tmp_path), download=False)
    source.prepare()
    assert source.train().labels.tolist() == [0, 1, 2, 3]
    assert source.test().images.shape == (2, 1, 16, 16)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, number in (("train", 3), ("t10k", 2)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, number, 28, 28) + bytes(784 * number)
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, number) + bytes(range(number)))
    source = MNIST(str(tmp_path), download=False)
    source.prepare()
    assert source.train().images.shape == (3, 1, 28, 28)
    assert source.test().labels.tolist() == [0, 1]
    with pytest.raises(MissingData, match=r"USPS: looked for usps.bz2, usps.t.bz2"):
        USPS(str(tmp_path / "nowhere"), download=False).prepare()


# WILDS ---------------------------------------------------------------------------------------------------------------


def picture(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 6), (9, 9, 9)).save(file)


def test_lists_of_pacs_count_from_1_where_no_folder_names_the_class(tmp_path):
    rows = [f"photo/{number}.png {label}" for number, label in enumerate((1, 7, 5))]
    (tmp_path / "image_list").mkdir()
    (tmp_path / "image_list" / "photo_all.txt").write_text("\n".join(rows))
    for number in range(3):
        picture(tmp_path / "photo" / f"{number}.png")
    source = PACS(str(tmp_path), "photo", size=8)
    assert [source.classes[label] for label in source.train().labels] == ["dog", "person", "horse"]


def test_camelyon17(tmp_path):
    base = tmp_path / "camelyon17_v1.0"
    rows = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for number, (center, split) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (3, 0)]):
        rows.append(f"{number},004,4,{number},7,{number % 2},0,{center},{split}")
        picture(base / "patches" / "patient_004_node_4" / f"patch_patient_004_node_4_x_{number}_y_7.png")
    (base / "metadata.csv").write_text("\n".join(rows))
    expected = {"train": [0, 0, 1], "id_val": [1], "val": [0], "test": [1], "hospital_3": [0, 1]}
    for domain, labels in expected.items():
        source = WILDS(str(tmp_path), "camelyon17", domain, size=4)
        source.prepare()
        assert source.classes == ("normal", "tumor")
        assert source.train().labels.tolist() == labels
    with pytest.raises(UserError, match=r"has no domain 'hospital3'; .* Did you mean 'hospital_3'"):
        WILDS(str(base), "camelyon17", "hospital3").prepare()
    with pytest.raises(UserError, match="dataset='camelyon' must be one of"):
        WILDS(str(base), "camelyon")
    with pytest.raises(MissingData, match=r"has no fmow. Expected one of(.|\n)*rgb_metadata.csv"):
        WILDS(str(tmp_path), "fmow").prepare()


def test_iwildcam(tmp_path):
    rows = ["split,location_remapped,filename,y", "train,3,a.jpg,0", "test,7,b.jpg,10", "train,5,c.jpg,2"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    for name in "abc":
        picture(tmp_path / "train" / f"{name}.jpg")
    source = WILDS(str(tmp_path), "iwildcam", "test", size=4)
    source.prepare()
    assert source.classes == ("0", "2", "10")
    assert source.train().labels.tolist() == [2]
    assert WILDS(str(tmp_path), "iwildcam", "location_5").train().labels.tolist() == [1]
    (tmp_path / "categories.csv").write_text("y,name\n0,zebra\n2,ant\n10,bee\n")
    source = WILDS(str(tmp_path), "iwildcam", "test", size=4)
    assert (source.classes, source.train().labels.tolist()) == (("ant", "bee", "zebra"), [1])


def test_fmow(tmp_path):
    rows = ["split,category,timestamp,country_code"]
    rows += [
        "train,zoo,2010-01-01T00:00:00Z,DEU",
        "val,dam,2014-01-01T00:00:00Z,CHN",
        "seq,dam,2017-01-01T00:00:00Z,CHN",
    ]
    rows += [
        "test,zoo,2017-02-01T00:00:00Z,XXX",
        "test,zoo,2011-02-01T00:00:00Z,DEU",
        "train,dam,2017-02-01T00:00:00Z,CHN",
        "val,dam,2013-01-01T00:00:00Z,CHN",  # the first of three years of validation
        "test,zoo,2016-01-01T00:00:00Z,DEU",
    ]
    (tmp_path / "rgb_metadata.csv").write_text("\n".join(rows))
    (tmp_path / "country_code_mapping.csv").write_text("alpha-3,region\nDEU,Europe\nCHN,Asia\n")
    for number in range(8):
        picture(tmp_path / "images" / f"rgb_img_{number}.png")
    numbers = {"train": [0], "val": [1, 6], "test": [3, 7], "id_test": [4]}
    numbers |= {"region_Asia": [1, 5, 6], "region_Other": [3]}
    for domain, wanted in numbers.items():
        source = WILDS(str(tmp_path), "fmow", domain, size=4)
        source.prepare()
        assert [int(path.rpartition("_")[2][:-4]) for path in source.train().paths] == wanted
        assert source.classes == ("dam", "zoo")


def test_samples_of_blended_digits_keep_their_numbers():
    samples = BlendedDigits(digits(torch.zeros(5, 1, 6, 6, dtype=torch.uint8))).train()
    assert isinstance(samples, TensorSamples)
    assert samples.ids.tolist() == list(range(5))[: len(samples)]
