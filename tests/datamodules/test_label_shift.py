import pytest
import torch

from datamodules import Blobs, LabelShiftData
from datamodules.label_shift import divide, draw_priors
from datamodules.splits import generator
from zoo.core.errors import UserError


def data(**arguments) -> LabelShiftData:
    defaults = {"num_domains": 5, "alpha": 3.0, "max_condition": 20.0, "batch_size": 10, "steps": 4, "val_size": 0.2}
    source = Blobs(num_classes=4, samples=800, test_samples=200)
    return LabelShiftData(source, **{**defaults, **arguments})


def test_priors_are_distributions_with_the_condition_that_was_asked_for() -> None:
    for alpha in (0.5, 3.0):
        drawn = draw_priors(4, 6, alpha, 4.0, seed=1)
        assert drawn.shape == (4, 6)
        torch.testing.assert_close(drawn.sum(dim=0), torch.ones(6, dtype=torch.float64))
        assert drawn.min() >= 0
        assert torch.linalg.cond(drawn) <= 4
        assert torch.equal(drawn, draw_priors(4, 6, alpha, 4.0, seed=1))
        assert not torch.equal(drawn, draw_priors(4, 6, alpha, 4.0, seed=2))
    with pytest.raises(UserError, match=r"max_condition=1\.01; the best is"):
        draw_priors(4, 6, 3.0, 1.01, seed=1, tries=2000)


def test_small_alpha_gives_domains_of_few_classes() -> None:
    shares = [draw_priors(5, 100, alpha, 100.0, seed=0).amax(dim=0).mean() for alpha in (0.1, 3.0, 100.0)]
    assert shares[0] > 0.9 > shares[1] > shares[2]
    assert shares[2] < 0.35


def test_domains_are_disjoint_of_one_size_and_have_these_frequencies() -> None:
    labels = torch.arange(800) % 4
    labels[::50] = -1
    priors = draw_priors(4, 5, 3.0, 20.0, seed=0)
    domains = divide(labels, priors, generator(0))
    sizes = {len(members) for members in domains}
    assert len(sizes) == 1
    together = torch.cat(domains)
    assert len(together.unique()) == len(together)
    assert (labels[together] >= 0).all()
    size = sizes.pop()
    table = torch.stack([labels[members].bincount(minlength=4) for members in domains], dim=1)
    assert ((table / size - priors).abs() < 1 / size).all()
    available = labels[labels >= 0].bincount()
    assert (available - table.sum(dim=1)).min() <= 5  # as large as the rarest class allows


def test_too_few_samples_are_named() -> None:
    with pytest.raises(UserError, match="too few samples"):
        divide(torch.tensor([0, 0, 1]), torch.full((3, 4), 1 / 3, dtype=torch.float64), generator(0))


def test_batches_hold_domains_and_hide_labels() -> None:
    module = data()
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))[0]["unlabeled"]
    assert set(batch) >= {"domain", "index", "hidden_label"}
    assert "label" not in batch
    assert 0 <= int(batch["domain"].min()) <= int(batch["domain"].max()) < 5


def test_every_sample_is_in_one_domain_of_one_part() -> None:
    module = data()
    module.setup("fit")
    parts = [module.parts[f"{part} {domain}"] for part in ("domain", "val") for domain in range(5)]
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)
    assert len({len(part) for part in parts[:5]}) == len({len(part) for part in parts[5:]}) == 1
    rows = list(module.unlabeled_dataloader())
    index, domain = torch.cat([row["index"] for row in rows]), torch.cat([row["domain"] for row in rows])
    assert torch.equal(index.sort().values, together.sort().values)
    assert (domain.bincount() == len(index) // 5).all()
    member = module.parts["val 3"][0]
    assert int(domain[index == member]) == 3
    held = torch.cat([row["held_out"] for row in rows])
    assert torch.equal(index[held].sort().values, torch.cat(parts[5:]).sort().values)


def test_validation_and_test_follow_the_same_frequencies() -> None:
    module = data(val_size=100)
    module.setup("fit")
    val, test = module.evaluation_sets("val")["val"], module.evaluation_sets("test")["test"]
    assert len(val) == 100
    for samples, tolerance in ((val, 0.5), (test, 0.2)):
        for domain in range(5):
            chosen = samples.labels[samples.columns["domain"] == domain]
            found = chosen.bincount(minlength=4) / len(chosen)
            assert (found - module.class_given_domain[:, domain]).abs().max() < tolerance


def test_the_same_seed_makes_the_same_domains() -> None:
    one, two, other = data(), data(), data(seed=1)
    for module in (one, two, other):
        module.setup("fit")
    for part in ("domain 2", "val 2"):
        assert torch.equal(one.parts[part], two.parts[part])
        assert not torch.equal(one.parts[part], other.parts[part])
    assert not torch.equal(one.class_given_domain, other.class_given_domain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_domains": 1}, "num_domains=1"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"max_condition": 0.5}, "max_condition=0.5"),
        ({"predict_folder": "x"}, "predict_folder"),
    ],
)
def test_wrong_arguments_are_named(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        data(**arguments)


def test_a_validation_set_that_leaves_nothing_is_named() -> None:
    with pytest.raises(UserError, match="val_size=5000"):
        data(val_size=5000).setup("fit")
