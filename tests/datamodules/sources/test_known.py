import pytest
import torch

from datamodules import Blobs, SemiSupervisedData
from datamodules.sources import ArraySource, KnownClasses
from zoo.core.errors import UserError


def source(**arguments):
    images = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    labels = torch.arange(20) % 4
    return ArraySource(4, images=images, labels=labels, test_images=images, test_labels=labels, size=4, **arguments)


def first_pixels(samples) -> list[int]:
    return samples[list(range(len(samples)))]["image"][:, 0, 0, 0].tolist()


def test_parts_by_hand() -> None:
    known = KnownClasses(source(classes=("a", "b", "c", "d")), known=[3, "a"])
    assert known.classes == ("d", "a")
    assert known.num_classes == 2
    for part in (known.train(), known.test()):
        assert first_pixels(part) == [i for i in range(20) if i % 4 in (0, 3)]
        assert part.labels.tolist() == [{0: 1, 3: 0}[i % 4] for i in first_pixels(part)]
        assert part.ids.tolist() == list(range(10))
    unknown = known.unknown()
    assert first_pixels(unknown) == [i for i in range(20) if i % 4 in (1, 2)]
    assert unknown.labels.eq(-1).all()
    assert known.unlabeled() is None


def test_samples_that_nobody_labelled_stay_and_are_not_unknown_ones() -> None:
    inner = source()
    labels = inner._given["labels"].clone()
    labels[5] = -1
    inner._given["labels"] = inner._given["test_labels"] = labels
    known = KnownClasses(inner, known=[0])
    assert first_pixels(known.train()) == [0, 4, 5, 8, 12, 16]
    assert known.train().labels.tolist() == [0, 0, -1, 0, 0, 0]
    assert 5 not in first_pixels(known.unknown())


def test_a_known_truth_of_unlabelled_samples_is_renumbered() -> None:
    class More(ArraySource):
        def unlabeled(self):
            return self.test()

    images = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    labels = torch.arange(8) % 4
    known = KnownClasses(
        More(4, images=images, labels=labels, test_images=images, test_labels=labels, size=4), known=[3, 0]
    )
    assert known.unlabeled().labels.tolist() == [1, -1, -1, 0] * 2


def test_looks_like_its_source_and_trains() -> None:
    inner = Blobs(num_classes=5, size=6, channels=3)
    known = KnownClasses(inner, known=[1, 2, 4])
    for name in ("channels", "size", "mean", "std", "flip", "streams"):
        assert getattr(known, name) == getattr(inner, name)
    assert known.name == "Blobs[1, 2, 4]"
    data = SemiSupervisedData(known, labels_per_class=4, batch_size=4, unlabeled_ratio=2, steps=1)
    data.setup("fit")
    assert data.num_classes == 3
    assert set(data.roles["unlabeled"].samples.labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ([], "must name at least one class"),
        ([1, 1], "each once"),
        ([1, "b"], "names a class twice"),
        ([4], "has no class 4"),
        (["bb"], "has no class 'bb'"),
        ([0, 1, 2, 3], "none is unknown"),
    ],
)
def test_errors(known, message) -> None:
    with pytest.raises(UserError, match=message):
        _ = KnownClasses(source(classes=("a", "b", "c", "d")), known=known).classes
