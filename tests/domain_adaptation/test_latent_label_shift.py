from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor

from datamodules import Blobs, LabelShiftData
from zoo import LatentLabelShift, Method
from zoo.core.errors import UserError
from zoo.core.label_shift import adjust, class_probabilities
from zoo.core.network import Network

NETWORK = partial(Network, backbone="lenet", in_channels=1)
ADAM = partial(torch.optim.Adam, lr=0.003)


def method(**arguments) -> LatentLabelShift:
    torch.manual_seed(0)
    return LatentLabelShift(**{"num_domains": 5, "network": NETWORK, "num_classes": 3, "optimizer": ADAM, **arguments})


def data(**arguments) -> LabelShiftData:
    source = Blobs(num_classes=3, size=28, samples=1500, test_samples=600, noise=20.0)
    defaults = {"num_domains": 5, "alpha": 1.0, "max_condition": 3.0, "batch_size": 50, "steps": 20, "val_size": 0.2}
    return LabelShiftData(source, **{**defaults, **arguments})


def trainer(folder, epochs: int = 3, **arguments) -> Trainer:
    return Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_epochs=epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[LatentLabelShift, Trainer, LabelShiftData]:
    found, module = method(), data()
    t = trainer(tmp_path_factory.mktemp("run"))
    t.fit(found, datamodule=module)
    return found, t, module


def test_the_loss_is_the_cross_entropy_of_the_domain() -> None:
    found = method()
    found.configure_model()
    x, domains = torch.randn(6, 1, 28, 28), torch.tensor([0, 1, 2, 3, 4, 0])
    logits = found.network(x)
    assert logits.shape == (6, 5)
    loss = found.training_step({"unlabeled": {"image": x, "domain": domains}}, 0)
    torch.testing.assert_close(loss, -logits.log_softmax(1)[torch.arange(6), domains].mean())


def test_outputs_are_adjusted_domain_probabilities() -> None:
    found = method()
    found.configure_model()
    found.class_given_domain = torch.rand(3, 5).softmax(dim=0)
    x, domains = torch.randn(4, 1, 28, 28), torch.tensor([4, 0, 1, 1])
    q = found.network(x).softmax(1)
    expected = class_probabilities(q, found.class_given_domain)
    torch.testing.assert_close(found(x).exp(), expected)
    assert found(x).isfinite().all()
    predicted = found.predict_step({"image": x, "domain": domains, "index": torch.arange(4)}, 0)
    torch.testing.assert_close(predicted["probabilities"], adjust(expected, found.class_given_domain, domains))
    torch.testing.assert_close(predicted["probabilities"].sum(1), torch.ones(4))


def test_an_untrained_one_knows_nothing() -> None:
    found = method()
    found.configure_model()
    assert torch.equal(found.posterior(torch.randn(2, 1, 28, 28)), torch.full((2, 3), 1 / 3))


def test_finds_the_classes_of_blobs_without_a_label(trained) -> None:
    found, t, module = trained
    assert int(found.rank) == 3
    torch.testing.assert_close(found.class_given_domain.sum(dim=0), torch.ones(5))
    values = t.test(found, datamodule=module, verbose=False)[0]
    assert values["test/accuracy"] > 0.9
    assert values["test/prior_error"] < 0.3
    assert values["test/rank"] == 3
    assert values["test/condition"] == pytest.approx(float(torch.linalg.cond(found.class_given_domain.double())))
    assert {"val/domain_loss", "val/domain_accuracy"} <= set(trainer_metrics(trained))


def trainer_metrics(trained) -> dict[str, Tensor]:
    found, t, module = trained
    return t.validate(found, datamodule=module, verbose=False)[0]


def test_validation_is_of_the_domains(trained) -> None:
    found, _, module = trained
    values = trainer_metrics(trained)
    held = module.evaluation_sets("val")["val"]
    x = module._as_floats(held.images_at(torch.arange(len(held))))
    with torch.no_grad():
        logits = found.eval().network(x)
    assert values["val/domain_loss"] == pytest.approx(float(F.cross_entropy(logits, held.columns["domain"])), abs=1e-4)


def test_a_checkpoint_holds_the_classes(trained, tmp_path) -> None:
    found, t, _ = trained
    t.save_checkpoint(tmp_path / "classes.ckpt", weights_only=False)
    loaded = Method.load_from_checkpoint(tmp_path / "classes.ckpt", map_location="cpu")
    assert torch.equal(loaded.class_given_domain, found.class_given_domain)
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(loaded.eval()(x), found.eval()(x))


def test_hidden_labels_decide_nothing(trained) -> None:
    found, _, module = trained
    before = found.class_given_domain.clone()
    samples = module._train(module.source)
    labels = samples.labels.clone()
    samples.labels.fill_(0)
    try:
        found.find_classes()
    finally:
        samples.labels.copy_(labels)
    assert torch.equal(found.class_given_domain, before)


def test_domains_that_do_not_differ_fail_loudly(tmp_path) -> None:
    found, module = method(), data()
    module._priors = torch.full((3, 5), 1 / 3, dtype=torch.float64)
    t = trainer(tmp_path, epochs=1)
    t.fit(found, datamodule=module)
    assert int(found.rank) == 1
    for run in (t.test, t.predict):
        with pytest.raises(UserError, match=r"cannot be told apart \(rank 1\)"):
            run(found, datamodule=module)


def test_other_data_and_other_domains_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="num_domains=5, but LabelShiftData has 4"):
        trainer(tmp_path).fit(method(), datamodule=data(num_domains=4))
    from datamodules import SupervisedData

    with pytest.raises(UserError, match="SupervisedData has no domains without labels"):
        trainer(tmp_path).fit(method(), datamodule=SupervisedData(Blobs(size=28), batch_size=10, steps=2))


@pytest.mark.parametrize("arguments", [{"num_domains": 2}, {"clusters": 2}, {"restarts": 0}])
def test_wrong_arguments_are_named(arguments) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        method(**arguments)
