import pytest
import torch

from datamodules import Blobs, SupervisedData
from datamodules.sources import MergedClasses
from zoo.core.errors import UserError


def test_classes_are_joined_and_the_source_keeps_the_finer_ones() -> None:
    source = Blobs(num_classes=4, samples=40, test_samples=12)
    merged = MergedClasses(source, [[0, 3], [1, 2]])
    assert merged.classes == ("blob 0 or blob 3", "blob 1 or blob 2")
    assert merged.num_classes == 2
    fine, coarse = source.train(), merged.train()
    assert torch.equal(coarse.labels, torch.tensor([0, 1, 1, 0])[fine.labels])
    assert torch.equal(coarse.images, fine.images)
    assert torch.equal(coarse.ids, fine.ids)
    assert torch.equal(source.train().labels, fine.labels), "the source itself is not changed"
    assert set(merged.test().labels.tolist()) == {0, 1}
    assert merged.group_of(torch.tensor([-1, 3])).tolist() == [-1, 0]
    assert merged.name != source.name


def test_a_regime_on_groups() -> None:
    data = SupervisedData(MergedClasses(Blobs(num_classes=4), [[0, 1], [2, 3]]), labels_per_class=5, batch_size=4)
    data.setup("fit")
    assert data.num_classes == 2
    assert len(data.split["labeled"]) == 10


@pytest.mark.parametrize("groups", [[[0], []], [[0, 1], [1]], [[0, 2]], []])
def test_groups_hold_every_class_once(groups) -> None:
    with pytest.raises(UserError, match="groups="):
        _ = MergedClasses(Blobs(num_classes=4), groups).classes
