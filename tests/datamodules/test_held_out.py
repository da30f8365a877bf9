import pytest

from datamodules import Blobs, DomainData, HeldOutDomainData
from zoo.core.errors import UserError


def sources() -> dict:
    return {name: Blobs(num_classes=3, samples=100, test_samples=10, size=8) for name in ("source", "target")}


def test_held_out_samples_are_in_no_other_part() -> None:
    data = HeldOutDomainData(**sources(), batch_size=4, steps=3, val_size=0.1, held_out=0.2)
    plain = DomainData(**sources(), batch_size=4, steps=3, val_size=0.1)
    for each in (data, plain):
        each.prepare_data()
        each.setup("fit")
    parts = {name: set(data.parts[name].tolist()) for name in ("target", "held_out", "oracle")}
    assert [len(parts[name]) for name in ("target", "held_out", "oracle")] == [72, 18, 10]
    assert len(set.union(*parts.values())) == 100
    assert parts["target"] | parts["held_out"] == set(plain.parts["target"].tolist())
    assert parts["oracle"] == set(plain.parts["oracle"].tolist())
    batches = [batch for batch, *_ in data.train_dataloader()]
    assert len(batches) == 3
    for batch in batches:
        made = data.on_after_batch_transfer(batch, 0)
        assert set(made) == {"source", "target", "held_out"}
        assert "label" not in made["held_out"]
        assert [len(made[role]["image"]) for role in ("source", "target", "held_out")] == [4, 4, 2]
        assert made["held_out"]["image"].is_floating_point()
        assert set(made["held_out"]["domain"].tolist()) == {1}


def test_number_of_held_out_samples_a_step() -> None:
    for given, batch_size, wanted in ((None, 32, 16), (None, 2, 2), (5, 4, 5)):
        assert (
            HeldOutDomainData(**sources(), batch_size=batch_size, held_out_batch_size=given).held_out_batch_size
            == wanted
        )
    with pytest.raises(UserError, match="held_out_batch_size=0"):
        HeldOutDomainData(**sources(), held_out_batch_size=0)


def test_held_out_samples_are_mirrored_where_those_of_all_domains_are() -> None:
    for flips in ((True, True), (False, True), (True, False)):
        domains = sources()
        for domain, flip in zip(domains.values(), flips, strict=True):
            domain.flip = flip
        data = HeldOutDomainData(**domains, batch_size=4, steps=1, val_size=0.1, held_out=0.2)
        data.setup("fit")
        assert {role.views["image"].flip for role in data.roles.values() if "image" in role.views} == {all(flips)}
        assert data.roles["target"].views["weak"].flip == all(flips)


def test_seed_decides_who_is_held_out() -> None:
    parts = []
    for seed in (0, 0, 1):
        data = HeldOutDomainData(**sources(), batch_size=4, steps=1, val_size=0, held_out=0.5, seed=seed)
        data.setup("fit")
        parts.append(set(data.parts["held_out"].tolist()))
    assert parts[0] == parts[1] != parts[2]


def test_share_is_checked() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match=f"held_out={share}"):
            HeldOutDomainData(**sources(), held_out=share)
