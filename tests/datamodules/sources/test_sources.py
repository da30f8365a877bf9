import ast
import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datamodules
from datamodules import (
    CIFAR10,
    CIFAR100,
    STL10,
    SVHN,
    ArraySource,
    Blobs,
    FashionMNIST,
    FileList,
    ImageFolder,
    MissingData,
    MNIST5k,
    Optdigits,
    SemiSupervisedData,
    find_source,
    sources,
)
from datamodules.sources import FileSamples, TensorSamples, base
from datamodules.sources.base import read_image, unreadable_images
from datamodules.sources.digits import resize


def test_importing_reads_no_data_library(root):
    """Heavy libraries are imported inside the functions that use them."""
    heavy = {"sklearn", "mlxtend", "torchvision", "timm", "scipy", "matplotlib", "transformers", "numpy", "PIL"}
    files = list((root / "datamodules").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {name.split(".")[0] for name in names}, file


def test_every_source_is_named_where_users_look():
    assert set(sources.__all__) <= set(datamodules.__all__)
    for package in (datamodules, sources):
        assert all(hasattr(package, name) for name in package.__all__)
    bases = {"Files", "DomainFiles", "Benchmark", "WrappedSource"}
    ours = {kind.__name__ for kind in below(base.Source) if kind.__module__.startswith("datamodules.")}
    assert {name for name in ours if not name.startswith("_")} - bases <= set(sources.__all__)


def below(kind):
    """A class and all that are derived from it."""
    return {kind}.union(*(below(child) for child in kind.__subclasses__()))


def test_mnist5k_has_a_fixed_stratified_test_set():
    source = MNIST5k()
    train, test = source.train(), source.test()
    assert train.images.shape == (4000, 1, 28, 28)
    assert test.images.shape == (1000, 1, 28, 28)
    assert torch.bincount(test.labels).tolist() == [100] * 10
    assert torch.bincount(train.labels).tolist() == [400] * 10
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)
    assert torch.equal(MNIST5k().test().images, test.images)


def test_optdigits_use_the_whole_range_and_are_enlarged():
    source = Optdigits()
    train, test = source.train(), source.test()
    assert train.images.shape == (1297, 1, 28, 28)
    assert torch.bincount(test.labels).tolist() == [50] * 10
    assert int(train.images.max()) == 255
    small = Optdigits(size=8).train()
    assert set((small.images.unique().double() * 16 / 255).round().int().tolist()) == set(range(17))


@pytest.mark.parametrize("source", [MNIST5k(), Optdigits()])
def test_stated_mean_and_std_are_those_of_the_pixels(source):
    pixels = source.train().images.float() / 255
    assert pixels.mean().item() == pytest.approx(source.mean[0], abs=0.01)
    assert pixels.std().item() == pytest.approx(source.std[0], abs=0.02)


def test_resize_keeps_constants_and_smooths():
    assert resize(torch.full((1, 1, 8, 8), 77, dtype=torch.uint8), 20).eq(77).all()
    board = (torch.arange(8) % 2 * 255).expand(8, 8).to(torch.uint8)
    assert (resize(board[None, None], 2).float() - 127.5).abs().max() < 40


def test_samples_keep_their_numbers_through_subsets():
    samples = TensorSamples(torch.arange(6, dtype=torch.uint8).view(6, 1, 1), torch.arange(6) % 2)
    part = samples.subset(torch.tensor([5, 3, 1])).subset(torch.tensor([2, 0]))
    batch = part[[0, 1]]
    assert batch["index"].tolist() == [1, 5]
    assert batch["image"].flatten().tolist() == [1, 5]
    assert batch["label"].tolist() == [1, 1]


def test_samples_carry_columns():
    samples = TensorSamples(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3)).with_columns(
        domain=torch.arange(3)
    )
    assert samples.subset(torch.tensor([2]))[[0]]["domain"].tolist() == [2]
    with pytest.raises(ValueError, match="column 'x' has 1 rows for 3 samples"):
        samples.with_columns(x=torch.zeros(1))


def test_tensor_samples_refuse_floats_and_lengths():
    with pytest.raises(TypeError, match="must be uint8"):
        TensorSamples(torch.zeros(2, 1, 2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="do not go with 3 labels"):
        TensorSamples(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(3))


def test_blobs_are_seeded_and_balanced():
    assert torch.equal(Blobs(seed=1).train().images, Blobs(seed=1).train().images)
    assert not torch.equal(Blobs(seed=1).train().images, Blobs(seed=2).train().images)
    assert torch.bincount(Blobs(num_classes=4, samples=40).train().labels).tolist() == [10] * 4
    train, test = Blobs().train(), Blobs().test()
    means = torch.stack([train.images[train.labels == label].float().mean(0) for label in range(3)])
    nearest = (test.images.float().unsqueeze(1) - means).flatten(2).norm(dim=2).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.9  # they can be learnt


def test_find_source_suggests():
    assert isinstance(find_source("Blobs", samples=9), Blobs)
    with pytest.raises(ValueError, match=r"unknown source 'FashionMnist'. Did you mean 'FashionMNIST'\?"):
        find_source("FashionMnist")


# Benchmark sets: the layouts that torchvision reads, written by hand -------------------------------------------------


def write_idx(folder, packed=False):
    folder.mkdir(parents=True)
    open_file = gzip.open if packed else open
    for prefix, count in (("train", 20), ("t10k", 10)):
        images, labels = np.arange(count * 784, dtype=np.uint64).astype(np.uint8), np.arange(count, dtype=np.uint8) % 10
        suffix = ".gz" if packed else ""
        with open_file(folder / f"{prefix}-images-idx3-ubyte{suffix}", "wb") as file:
            file.write(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        with open_file(folder / f"{prefix}-labels-idx1-ubyte{suffix}", "wb") as file:
            file.write(struct.pack(">II", 2049, count) + labels.tobytes())


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_plain_or_packed(tmp_path, packed):
    write_idx(tmp_path / "FashionMNIST" / "raw", packed)
    source = FashionMNIST(str(tmp_path), download=False)
    source.prepare()
    assert source.train().images.shape == (20, 1, 28, 28)
    assert source.test()[[3]]["label"].tolist() == [3]
    assert source.train()[[0]]["image"].flatten()[:3].tolist() == [0, 1, 2]


SETS = [FashionMNIST, CIFAR10, CIFAR100, SVHN, STL10]


@pytest.mark.parametrize("kind", SETS)
def test_absent_sets_say_where_and_how(tmp_path, kind):
    source = kind(str(tmp_path / "nowhere"), download=False)
    with pytest.raises(MissingData, match="nowhere") as error:
        source.prepare()
    assert "download=true" in str(error.value)
    assert source.folder in str(error.value)
    with pytest.raises(MissingData):
        source.train()


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    from torchvision import datasets

    def offline(*args, download=False, **kwargs):
        raise OSError("no route to host") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(MissingData, match=r"the download failed .OSError: no route to host"):
        CIFAR10(str(tmp_path)).prepare()


@pytest.mark.parametrize("kind", SETS)
def test_names_are_as_many_as_classes(kind):
    source = kind()
    assert source.num_classes == len(set(source.classes)) == (100 if kind is CIFAR100 else 10)
    assert len(source.mean) == len(source.std) == source.channels


def test_cifar10_from_its_own_files(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10.classes)}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    source = CIFAR10(str(tmp_path), download=False)
    source.prepare()
    train = source.train()
    assert train.images.shape == (20, 3, 32, 32)
    first = pickle.loads((folder / "data_batch_1").read_bytes())["data"][0]
    assert train.images[0].flatten().tolist() == first.tolist()  # channels first, as stored
    assert train.labels.tolist() == [0, 1, 2, 9] * 5


def test_stl10_from_its_own_files(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (3, 3, 96, 96), dtype=np.uint8) for name in ("train", "test", "unlabeled")}
    for name, images in pixels.items():
        images.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")  # column by column, as the set is stored
        if name != "unlabeled":
            np.array([1, 10, 5], dtype=np.uint8).tofile(folder / f"{name}_y.bin")  # counted from 1
    (folder / "class_names.txt").write_text("\n".join(STL10.classes))
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    source = STL10(str(tmp_path), download=False)
    source.prepare()
    assert torch.equal(source.train().images, torch.from_numpy(pixels["train"]))
    assert source.test().labels.tolist() == [0, 9, 4]
    assert source.unlabeled().labels.tolist() == [-1] * 3


def test_the_folds_of_stl10(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, count in (("train", 6), ("test", 2), ("unlabeled", 3)):
        (np.arange(count, dtype=np.uint8)[:, None] * np.ones(27648, dtype=np.uint8)).tofile(folder / f"{name}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(STL10.classes))
    (folder / "fold_indices.txt").write_text("\n".join(f"{fold % 6} {(fold + 2) % 6} " for fold in range(10)))
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    for fold in (0, 9):
        source = STL10(str(tmp_path), download=False, fold=fold)
        source.prepare()
        assert source.train().labels.tolist() == [fold % 6, (fold + 2) % 6]
        assert source.train().images[:, 0, 0, 0].tolist() == source.train().labels.tolist()
        assert (len(source.test()), len(source.unlabeled())) == (2, 3)
    assert len(STL10(str(tmp_path), download=False).train()) == 6
    with pytest.raises(ValueError, match=r"STL10: fold=10 must be 0\.\.9"):
        STL10(fold=10)
    (folder / "fold_indices.txt").unlink()
    with pytest.raises(MissingData, match=r"fold_indices.txt in .*stl10_binary"):
        STL10(str(tmp_path), download=False, fold=1).prepare()


def test_svhn_from_its_own_files(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision import datasets

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for name in ("train", "test", "extra"):
        savemat(tmp_path / f"{name}_32x32.mat", {"X": images, "y": np.array([[10], [1], [2], [9]])})  # 10 stands for 0
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    source = SVHN(str(tmp_path), download=False, extra=True)
    source.prepare()
    assert source.train().labels.tolist() == [0, 1, 2, 9]
    assert source.train().images[1].permute(1, 2, 0).tolist() == images[..., 1].tolist()
    assert len(source.unlabeled()) == 4
    assert SVHN(str(tmp_path), download=False).unlabeled() is None


# Files ---------------------------------------------------------------------------------------------------------------


def picture(path, mode="RGB", colour=(200, 100, 50), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    if mode == "P":
        image = image.quantize(8)
    elif mode == "RGBA":
        image.putalpha(0)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    for part in ("train", "test"):
        for label, name in enumerate(("bee", "ant")):
            for i in range(3):
                picture(tmp_path / part / name / f"a photo {i}.png", colour=(label * 100, i, 0))
    return tmp_path


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_picture_is_read(tmp_path, mode, channels):
    suffix = "tif" if mode == "CMYK" else "png"
    pixels = read_image(picture(tmp_path / f"x.{suffix}", mode), 16, channels)
    assert pixels.shape == (channels, 16, 16)
    assert pixels.dtype == torch.uint8


def test_colours_survive_palettes_and_transparency_becomes_white(tmp_path):
    plain = read_image(picture(tmp_path / "a.png"), 8)
    assert plain[:, 0, 0].tolist() == [200, 100, 50]
    palette = read_image(picture(tmp_path / "b.png", "P"), 8)
    assert (palette.int() - plain.int()).abs().max() <= 4
    assert read_image(picture(tmp_path / "c.png", "RGBA"), 8).eq(255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32768], [0, 65535]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 2, 1).flatten().tolist() == pytest.approx([0, 127, 0, 255], abs=1)


def test_the_middle_square_is_cut_out(tmp_path):
    image = np.zeros((4, 12, 3), dtype=np.uint8)
    image[:, 4:8] = 255
    Image.fromarray(image).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 4).eq(255).all()


def test_image_folder_with_both_parts(tree):
    source = ImageFolder(str(tree), size=8)
    assert source.classes == ("ant", "bee")  # sorted, not in the order of creation
    assert source.num_classes == 2
    source.prepare()
    train = source.train()
    assert not train.in_memory
    batch = train[[0, 5]]
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["label"].tolist() == [0, 1]
    assert batch["image"][:, 0, 0, 0].tolist() == [100, 0]
    assert len(source.test()) == 6


def test_image_folder_without_parts_holds_out(tmp_path):
    for name in ("x", "y"):
        for i in range(10):
            picture(tmp_path / name / f"{i}.png")
    source = ImageFolder(str(tmp_path), size=8, test_fraction=0.3)
    train, test = source.train(), source.test()
    assert torch.bincount(train.labels).tolist() == [7, 7]
    assert torch.bincount(test.labels).tolist() == [3, 3]
    assert not set(train.paths) & set(test.paths)


def test_image_folder_missing_prints_the_tree(tmp_path):
    with pytest.raises(MissingData, match=r"does not exist. Expected:\n.*train/CLASS/\*.png"):
        ImageFolder(str(tmp_path / "none")).prepare()
    with pytest.raises(MissingData, match="holds no class folders"):
        ImageFolder(str(tmp_path)).prepare()
    (tmp_path / "cat").mkdir()
    with pytest.raises(MissingData, match="holds no images"):
        ImageFolder(str(tmp_path)).prepare()


def test_a_test_folder_may_not_have_other_classes(tree):
    picture(tree / "test" / "cow" / "1.png")
    with pytest.raises(ValueError, match=r"class folders that .* has not: cow"):
        ImageFolder(str(tree), size=8).prepare()


def broken(tree):
    """Four kinds of damage, of which the last shows only when the whole file is read."""
    whole = picture(tree / "train" / "ant" / "y.png", size=(60, 60))
    content = whole.read_bytes()
    files = {"empty.png": b"", "foreign.jpg": b"no picture", "short.png": content[: len(content) // 2]}
    middle = bytearray(content)
    middle[45:55] = b"0123456789"
    for name, data in {**files, "middle.png": bytes(middle)}.items():
        (tree / "train" / "bee" / name).write_bytes(data)
    jpeg = picture(tree / "test" / "ant" / "fine.jpg", size=(60, 60))
    jpeg.write_bytes(jpeg.read_bytes() + b"added by a camera")
    half = picture(tree / "test" / "ant" / "half.jpg", size=(60, 60))
    half.write_bytes(half.read_bytes()[:-30])
    return [*files, "half.jpg"]


def test_unreadable_images_are_found_before_training(tree):
    names = broken(tree)
    paths = [str(path) for path in tree.rglob("*.*g")]
    assert sorted(Path(path).name for path in unreadable_images(paths)) == sorted(names)
    assert sorted(Path(path).name for path in unreadable_images(paths, decode=True)) == sorted([*names, "middle.png"])
    with pytest.raises(ValueError, match=r"cannot read the image '.*empty.png'.* 4 of 19 .*foreign.jpg.* skip_broken"):
        ImageFolder(str(tree), size=8).prepare()
    samples = ImageFolder(str(tree), size=8).train()
    damaged = [i for i, path in enumerate(samples.paths) if path.endswith("middle.png")]
    with pytest.raises(ValueError, match=r"cannot read the image '.*middle.png'"):
        samples[damaged]


def test_unreadable_images_are_passed_over_on_request(tree):
    names = broken(tree)
    source = ImageFolder(str(tree), size=8, skip_broken=True)
    with pytest.warns(UserWarning, match=r"ImageFolder: passing over 5 of 19 images that cannot be read:") as caught:
        source.prepare()
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in [*names, "middle.png"])
    assert len(source.train()) == 7
    assert source.train()[list(range(7))]["image"].shape == (7, 3, 8, 8)
    assert len(source.test()) == 7


def test_a_missing_file_of_a_list_is_named(tree):
    (tree / "all.csv").write_text("path,label\ntrain/ant/a photo 0.png,0\ntrain/bee/none.png,1\n")
    with pytest.raises(ValueError, match=r"cannot read the image '.*none.png'.* 1 of 2"):
        FileList(str(tree / "all.csv")).prepare()


def test_large_sets_are_checked_once(tree, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(base, "_MANY", 5)
    paths = [str(path) for path in tree.rglob("*.png")]
    read, original = [], base._reason
    monkeypatch.setattr(base, "_reason", lambda name, decode: read.append(name) or original(name, decode))
    assert unreadable_images(paths) == unreadable_images(paths) == {}
    assert sorted(read) == sorted(paths)
    Path(paths[3]).write_bytes(b"changed")
    assert list(unreadable_images(paths)) == [paths[3]]
    assert list(unreadable_images(paths)) == [paths[3]]
    assert len(read) == 2 * len(paths)


def test_images_of_mixed_size_are_brought_to_one(tmp_path):
    for name in ("ant", "bee"):
        for number in range(4):
            picture(tmp_path / name / f"{number}.png", size=(10 + 7 * number, 30 - 5 * number))
    source = ImageFolder(str(tmp_path), size=8, test_fraction=0.25)
    source.prepare()
    assert source.train()[list(range(6))]["image"].shape == (6, 3, 8, 8)


def test_unlabelled_images_in_their_folder(tree):
    picture(tree / "unlabeled" / "deep" / "1.png")
    picture(tree / "unlabeled" / "2.png")
    source = ImageFolder(str(tree), size=8)
    assert source.unlabeled().labels.tolist() == [-1, -1]
    assert source.classes == ("ant", "bee")
    data = SemiSupervisedData(source, labels_per_class=1, batch_size=2, unlabeled_ratio=1, val_size=2)
    data.setup("fit")
    assert len(data.roles["unlabeled"].samples) == 6 - 2 + 2
    for path in (tree / "unlabeled").rglob("*.png"):
        path.unlink()
    with pytest.raises(MissingData, match="unlabeled holds no images"):
        source.prepare()


def test_file_list_with_spaces_names_and_offsets(tree):
    lines = [f"train/ant/a photo {i}.png 1" for i in range(3)] + [f"train/bee/a photo {i}.png 2" for i in range(3)]
    (tree / "all.txt").write_text("\n".join(lines) + "\n")
    source = FileList(str(tree / "all.txt"), size=8, first_label=1, classes=("ant", "bee"), test_fraction=0.34)
    assert len(source.train()) == 4
    assert torch.bincount(source.test().labels).tolist() == [1, 1]
    assert FileList(str(tree / "all.txt"), first_label=1).num_classes == 2
    with pytest.raises(ValueError, match="label '2', which is none of the classes"):
        FileList(str(tree / "all.txt"), classes=("ant", "bee")).prepare()


def test_file_list_from_csv_with_unlabelled_rows(tree):
    rows = ["path,label", "train/ant/a photo 0.png,ant", "train/bee/a photo 0.png,bee", "train/bee/a photo 1.png,"]
    (tree / "all.csv").write_text("\n".join(rows))
    source = FileList(str(tree / "all.csv"), test_list=str(tree / "all.csv"), size=8)
    assert source.classes == ("ant", "bee")
    assert source.train().labels.tolist() == [0, 1]
    assert source.unlabeled().labels.tolist() == [-1]
    (tree / "bad.csv").write_text("file,label\n")
    with pytest.raises(ValueError, match=r"bad.csv has the columns file, label; path and label are needed"):
        FileList(str(tree / "bad.csv")).prepare()
    for line, message in (
        ("a.png", "line 2: not the 2 fields"),
        ("a.png,1,2", "line 2: not"),
        (",1", "line 2: no path"),
    ):
        (tree / "bad.csv").write_text(f"path,label\n{line}\n")
        with pytest.raises(ValueError, match=message):
            FileList(str(tree / "bad.csv")).prepare()
    (tree / "bad.txt").write_text("a.png 0\n\nb.png\n")
    with pytest.raises(ValueError, match=r"bad.txt, line 3 is 'b.png'; expected 'path label'"):
        FileList(str(tree / "bad.txt")).prepare()
    other = "\ufeffid,file,kind\n7,train/ant/a photo 0.png,ant\n8,train/bee/a photo 0.png,bee\n"
    (tree / "other.csv").write_text(other, encoding="utf-8")
    source = FileList(str(tree / "other.csv"), str(tree / "other.csv"), path_column="file", label_column="kind", size=8)
    source.prepare()
    assert source.train()[[0, 1]]["label"].tolist() == [0, 1]
    with pytest.raises(MissingData, match="there is no list"):
        FileList(str(tree / "none.txt")).prepare()


def test_file_samples_subset_keeps_paths(tree):
    samples = ImageFolder(str(tree), size=8).train().subset(torch.tensor([4, 1]))
    assert isinstance(samples, FileSamples)
    assert samples.paths[1].endswith("ant/a photo 1.png")
    assert samples.ids.tolist() == [4, 1]


# Arrays --------------------------------------------------------------------------------------------------------------


def tensors():
    return torch.randint(0, 256, (20, 1, 6, 6), dtype=torch.uint8), torch.arange(20) % 4


@pytest.mark.parametrize("suffix", ["npz", "pt", "safetensors"])
def test_arrays_from_every_kind_of_file(tmp_path, suffix):
    from safetensors.torch import save_file

    images, labels = tensors()
    path = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        np.savez(path, images=images.numpy(), labels=labels.numpy())
    elif suffix == "pt":
        torch.save({"images": images, "labels": labels}, path)
    else:
        save_file({"images": images, "labels": labels}, path)
    source = ArraySource(4, path=str(path), size=6)
    source.prepare()
    assert torch.bincount(source.test().labels).tolist() == [1] * 4
    assert torch.bincount(source.train().labels).tolist() == [4] * 4


def test_arrays_from_python_channels_last_and_unlabelled(tmp_path):
    images, labels = tensors()
    colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    source = ArraySource(4, images=colour, labels=labels, test_images=colour, test_labels=labels, size=6, channels=3)
    assert source.train().images.shape == (20, 3, 6, 6)
    torch.save({"images": images, "labels": labels, "unlabeled_images": images[:5]}, tmp_path / "x.pt")
    assert ArraySource(4, path=str(tmp_path / "x.pt"), size=6).unlabeled().labels.eq(-1).all()


def test_arrays_of_mixed_size(tmp_path):
    mixed = [np.zeros((4, 4), dtype=np.uint8), np.zeros((5, 4), dtype=np.uint8)]
    with pytest.raises(ValueError, match="ArraySource: images are not numbers of one shape"):
        ArraySource(2, images=mixed, labels=[0, 1])
    objects = np.empty(2, dtype=object)
    objects[:] = mixed
    np.savez(tmp_path / "x.npz", images=objects, labels=np.arange(2))
    with pytest.raises(ValueError, match=r"x.npz holds something else than arrays of numbers of one shape"):
        ArraySource(2, path=str(tmp_path / "x.npz")).train()


def test_arrays_that_do_not_fit(tmp_path):
    images, labels = tensors()
    with pytest.raises(ValueError, match="channels=1 and size=28 say"):
        ArraySource(4, images=images, labels=labels).train()
    with pytest.raises(ValueError, match=r"unknown class ids 3; with num_classes=3 they are 0\.\.2"):
        ArraySource(3, images=images, labels=labels, size=6).train()
    with pytest.raises(ValueError, match="either path or images"):
        ArraySource(3)
    with pytest.raises(MissingData, match="there is no file"):
        ArraySource(3, path=str(tmp_path / "none.npz")).prepare()
    torch.save({"x": images}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds x; images and labels are needed"):
        ArraySource(4, path=str(tmp_path / "x.pt")).train()
