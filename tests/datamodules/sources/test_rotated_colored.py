import pytest
import torch

from datamodules import Blobs, GeneralizationData, Phrases
from datamodules.sources import Colored, Rotated
from zoo.core.errors import UserError

SOURCE = Blobs(num_classes=4, size=9, samples=82, test_samples=21)


def test_right_angles_are_exact_and_others_are_turned_counter_clockwise() -> None:
    plain = SOURCE.train().images
    assert torch.equal(Rotated(SOURCE, 0).train().images, plain)
    assert torch.equal(Rotated(SOURCE, 360).train().images, plain)
    for degrees, turns in ((90, 1), (180, 2), (-90, 3), (270, 3)):
        assert torch.equal(Rotated(SOURCE, degrees).train().images, plain.rot90(turns, (-2, -1)))
    near = Rotated(SOURCE, 89.999).train().images.int()
    assert (near - plain.rot90(1, (-2, -1)).int()).abs().float().mean() < 1.0
    corner = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    corner[0, 0, 4, 8] = 200  # east of the centre goes north-east
    from datamodules.sources.rotated import rotate

    where = rotate(corner, 45)[0, 0].float()
    assert where[:4, 5:].sum() > 0.9 * where.sum() > 0


def test_rotation_leaves_labels_and_numbers_alone_and_the_source_too() -> None:
    before = SOURCE.train()
    turned = Rotated(SOURCE, 30).train()
    assert torch.equal(turned.labels, before.labels)
    assert torch.equal(turned.ids, before.ids)
    assert torch.equal(SOURCE.train().images, before.images)
    assert not torch.equal(Rotated(SOURCE, 30).test().images, SOURCE.test().images)
    assert Rotated(SOURCE, 30).unlabeled() is None


@pytest.mark.parametrize("make", [lambda part: Rotated(SOURCE, 15, part), lambda part: Colored(SOURCE, 0.2, part=part)])
def test_parts_are_disjoint_and_stratified_and_together_the_whole(make) -> None:
    parts = [make((i, 3)).train() for i in range(3)]
    ids = torch.cat([part.ids for part in parts])
    assert torch.equal(ids.sort().values, torch.arange(82))
    whole = SOURCE.train()
    for part in parts:
        assert torch.equal(part.ids, part.ids.sort().values)
        sizes = torch.bincount(whole.labels[part.ids], minlength=4)
        assert sizes.max() - sizes.min() <= 2
        assert abs(len(part) - 82 / 3) < 1
    assert len(make((0, 3)).test()) == 21
    assert not torch.equal(make((0, 3)).train().ids, type(parts[0])(whole.images, whole.labels).ids[::3])
    assert len({make(part).name for part in (None, (0, 3), (1, 3), (0, 4))}) == 4


def test_a_part_is_its_share_of_the_whole() -> None:
    whole, part = Colored(SOURCE, 0.3).train(), Colored(SOURCE, 0.3, part=(1, 4)).train()
    assert torch.equal(whole.images[part.ids], part.images)
    assert torch.equal(whole.labels[part.ids], part.labels)
    assert not part.columns


def test_colours_and_labels_without_chance() -> None:
    fine, grey = SOURCE.train().labels, SOURCE.train().images
    for flip in (0.0, 1.0):
        for noise in (0.0, 1.0):
            made = Colored(SOURCE, flip, noise).train()
            label = (fine < 2).long() if noise == 0.0 else (fine >= 2).long()
            assert torch.equal(made.labels, label)
            color = label if flip == 0.0 else 1 - label
            rows = torch.arange(len(fine))
            assert torch.equal(made.images[rows, color], grey[:, 0])
            assert not made.images[rows, 1 - color].any()


def test_rates_and_their_independence() -> None:
    source = Blobs(num_classes=10, size=3, samples=20_000, test_samples=10)
    made = Colored(source, 0.1)
    fine, samples = source.train().labels, made.train()
    color = (samples.images[:, 1].float().sum((1, 2)) > samples.images[:, 0].float().sum((1, 2))).long()
    wrong, flipped = samples.labels != (fine < 5).long(), color != samples.labels
    assert wrong.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert flipped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert flipped[wrong].float().mean().item() == pytest.approx(0.1, abs=0.015)
    # colour is the better cue here: it is right for 90 % of the labels, the shape for 75 %
    other = Colored(source, 0.1, seed=1).train()
    assert not torch.equal(other.labels, samples.labels)
    assert torch.equal(Colored(source, 0.1).train().images, samples.images)


def test_channels_step_and_statistics() -> None:
    made = Colored(SOURCE, 0.1, channels=3, step=2)
    samples = made.train()
    assert samples.images.shape[1:] == (3, 5, 5)
    assert made.size == 5
    assert not samples.images[:, 2].any()
    grey = SOURCE.train().images[:, 0, ::2, ::2]
    assert torch.equal(samples.images.amax(1), grey)
    assert len(made.mean) == len(made.std) == 3
    assert min(made.std) > 0
    # half of the images are in a channel: mean and standard deviation as of a mixture with black
    source = Blobs(num_classes=2, size=9, samples=2000)
    source.mean, source.std = (
        ((source.train().images / 255).mean().item(),),
        ((source.train().images / 255).std().item(),),
    )
    two = Colored(source, 0.5)
    pixels = two.train().images.float() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(list(two.mean), abs=0.02)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(list(two.std), abs=0.02)
    colour = Colored(Blobs(num_classes=2, size=9, channels=3), 0.5)
    assert colour.train().images.shape[1] == 2


def test_unknown_labels_stay_unknown() -> None:
    labels, colors = Colored(SOURCE, 0.2).labels_and_colors(torch.tensor([-1, 0, 3, -1]), 13)
    assert labels[[0, 3]].tolist() == [-1, -1]
    assert (labels[1:3] >= 0).all()
    assert ((colors == 0) | (colors == 1)).all()


def test_both_under_generalization() -> None:
    source = [Colored(SOURCE, e, part=(i, 3)) for i, e in enumerate((0.1, 0.2))]
    data = GeneralizationData(source, Colored(SOURCE, 0.9, part=(2, 3)), batch_size=8, steps=2, val_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))[0]
    batch = data.on_after_batch_transfer(batch, 0)["source"]
    assert batch["image"].shape == (8, 2, 9, 9)
    assert batch["domain"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert data.num_classes == 2
    assert data.classes == ("blob 2 or blob 3", "blob 0 or blob 1")
    source = [Rotated(SOURCE, 15 * i, (i, 3)) for i in range(2)]
    data = GeneralizationData(source, Rotated(SOURCE, 30, (2, 3)), batch_size=8, steps=2, val_size=4)
    data.setup("fit")
    assert data.num_classes == 4


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Rotated(SOURCE, 3, (2, 2)), "part="),
        (lambda: Rotated(SOURCE, 3, (-1, 2)), "part="),
        (lambda: Colored(SOURCE, 1.1), "color_flip=1.1"),
        (lambda: Colored(SOURCE, 0.1, label_noise=-0.1), "label_noise=-0.1"),
        (lambda: Colored(SOURCE, 0.1, channels=1), "channels=1"),
        (lambda: Colored(SOURCE, 0.1, step=10), "step=10"),
        (lambda: Rotated(Phrases(num_classes=2), 3), "has texts"),
        (lambda: Colored(Phrases(num_classes=2), 0.3), "has texts"),
    ],
)
def test_refusals(make, what) -> None:
    with pytest.raises(UserError, match=what):
        make()
