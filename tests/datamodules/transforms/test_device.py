"""Views on an accelerator: drawn on the host, made without waiting for the device."""

from contextlib import contextmanager

import pytest
import torch

from datamodules import Blobs, SemiSupervisedData
from datamodules.base import seeded
from datamodules.segmentation import PairView
from datamodules.transforms import OPERATION_SETS, Channels, Compose, Downsample, Strong, Weak

VIEWS = {
    "weak": Weak(),
    "black": Weak(padding="black"),
    "photos": Strong(ops="photos", probability=1.0),
    "digits": Strong(ops="digits", flip=False, padding="black"),
    "coarse": Compose([Downsample(4), Weak()]),
    "grey": Channels(1),
    "pair": PairView(scale=(0.8, 1.2), flip=True),
    **{name: Strong(num_ops=1, ops=[name], probability=1.0, cutout=0) for name in OPERATION_SETS["photos"]},
}


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def drawn(view, images):
    with seeded(7):
        made = view(images)
    return made[0] if isinstance(view, PairView) else made


@pytest.mark.parametrize("name", VIEWS)
def test_only_the_hosts_generator_draws(name):
    """The same seed gives the same view, and the stream outside stays where it was."""
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    before = torch.get_rng_state()
    one = drawn(VIEWS[name], images)
    torch.rand(3)
    assert torch.equal(drawn(VIEWS[name], images), one)
    torch.set_rng_state(before)
    drawn(VIEWS[name], images)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", VIEWS)
def test_the_device_gives_the_hosts_views_without_waiting(name):
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    host = drawn(VIEWS[name], images)
    there, state = images.cuda(), torch.cuda.get_rng_state()
    drawn(VIEWS[name], there)  # libraries load on first use, and wait then
    with no_waiting():
        made = drawn(VIEWS[name], there)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    different = (made.cpu().int() - host.int()).abs()
    assert (different > 1).float().mean() < 1e-3  # float rounding at the edge of a pixel


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_is_finished_without_waiting():
    data = SemiSupervisedData(Blobs(channels=3, size=32), labels_per_class=4, batch_size=8, unlabeled_ratio=2)
    data.setup("fit")
    index = data.roles["unlabeled"].samples.ids
    data.set_pseudo_labels(index, torch.eye(3)[index % 3])
    for step, (batch, _, _) in enumerate(data.train_dataloader()):
        moved = {
            role: {key: value.cuda() if torch.is_tensor(value) else value for key, value in entries.items()}
            for role, entries in batch.items()
        }
        if step == 5:  # tables and constants have moved, libraries are loaded
            with no_waiting():
                made = data.on_after_batch_transfer(moved, 0)["unlabeled"]
            assert torch.equal(made["pseudo_label"].argmax(1), made["index"] % 3)
            return
        data.on_after_batch_transfer(moved, 0)
