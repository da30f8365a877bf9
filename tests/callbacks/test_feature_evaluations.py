from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks import FewShotEvaluation, LinearEvaluation
from callbacks.linear_evaluation import predict
from datamodules import Blobs, Phrases, SupervisedData
from zoo import Network, Supervised
from zoo.core.errors import UserError

TRAINER = {"local_rank": 0, "strategy": SimpleNamespace(barrier=lambda name: None)}


def measure(*callbacks, ranks=1, **source):
    data = SupervisedData(Blobs(num_classes=3, size=8, channels=1, samples=90, test_samples=60, **source), batch_size=8)
    torch.manual_seed(0)
    method = Supervised(network=partial(Network, backbone="tiny_cnn", in_channels=1), num_classes=3)
    trainer = Trainer(
        accelerator="cpu", devices=ranks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), strategy="ddp_fork" if ranks > 1 else "auto",
    )  # fmt: skip
    return trainer.test(method, datamodule=data, verbose=False)[0]


def other(**arguments):
    return Blobs(**{"num_classes": 6, "size": 8, "channels": 1, "samples": 240, "test_samples": 180, **arguments})


def callbacks():
    few = FewShotEvaluation(other(), ways=4, shots=(1, 5), queries=5, tasks=40, weight=0.1)
    return [few, LinearEvaluation(other(), samples_per_class=(2, 10), repeats=2)]


def test_features_of_new_classes_are_measured_with_few_labels_and_on_two_ranks_alike():
    one = measure(*callbacks())
    assert one["few_shot/5_shot/accuracy"] >= one["few_shot/1_shot/accuracy"] > 0.5  # a random network on easy blobs
    assert 0 < one["few_shot/1_shot/interval"] < 0.2
    assert one["linear/logistic/10"] > 0.5
    assert one["linear/naive_bayes/10"] > 0.5
    two = measure(*callbacks(), ranks=2)
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=1e-3), name


def test_sources_that_do_not_fit_are_refused_before_the_test():
    with pytest.raises(UserError, match="1 channels of size 12, but the network was trained on 1 of size 8"):
        measure(FewShotEvaluation(other(size=12)))
    with pytest.raises(UserError, match="ways=7, but there are only 6 classes"):
        measure(FewShotEvaluation(other(), ways=7))
    with pytest.raises(UserError, match="has only"):
        measure(LinearEvaluation(other(), samples_per_class=(2, 500)))
    with pytest.raises(UserError, match="Did you mean 'logistic'"):
        LinearEvaluation(classifiers=["logistics"])
    with pytest.raises(UserError, match="tasks=0"):
        FewShotEvaluation(other(), tasks=0)


def test_texts_need_the_vocabulary_that_the_network_knows():
    callback = FewShotEvaluation(Phrases(num_classes=3, samples=90, words=9), ways=2, queries=2)
    with pytest.raises(UserError, match="has not the vocabulary of Phrases"):
        callback.setup(SimpleNamespace(**TRAINER, datamodule=SupervisedData(Phrases())), None, "test")
    callback.source = Phrases(seed=3, tokenizer="words")
    callback.source.read = Phrases().read
    callback.setup(SimpleNamespace(**TRAINER, datamodule=SupervisedData(Phrases())), None, "test")


def test_samples_whose_class_nobody_knows_are_not_counted_as_wrong():
    known, partly = other(), other()
    test = partly.test()
    test.labels = test.labels.where(torch.arange(len(test)) % 2 == 0, -1)
    half = test.subset((test.labels >= 0).nonzero().flatten())
    known.test, partly.test = lambda: half, lambda: test
    assert measure(LinearEvaluation(known, (2,), repeats=1)) == measure(LinearEvaluation(partly, (2,), repeats=1))


@pytest.mark.parametrize("name", ["naive_bayes", "logistic"])
def test_linear_classifiers_reach_the_bayes_error_of_two_gaussians(name):
    # means two standard deviations apart along one axis: error Φ(-1) = 0.1587
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat(4000)
    x = torch.randn(8000, 2, generator=generator)
    x[:, 0] += 2.0 * labels
    found = predict(name, x[:4000], labels[:4000], x[4000:], 2)
    assert float((found != labels[4000:]).float().mean()) == pytest.approx(0.1587, abs=0.015)
