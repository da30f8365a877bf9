"""Does each method do what it is for? Against its own baseline, on small sets, averaged over fixed seeds.

The figures seen when a test was written stand beside its margin, which is at most half of the gap seen.
"""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from callbacks import EMATeacher, PredictionWriter
from datamodules import (
    DigitScenes,
    DomainData,
    MNIST5k,
    SegmentationData,
    SemiSupervisedData,
    SupervisedData,
    WeakLabelData,
)
from datamodules.sources import Samples, TensorSamples
from datamodules.transforms import Downsample, Identity
from zoo import (
    CAM,
    DANN,
    ConfidenceWeakToStrong,
    FixMatch,
    KnowledgeDistillation,
    NaiveWeakToStrong,
    Network,
    SourceOnly,
    Supervised,
)
from zoo.core.schedules import CosineLR, InverseDecayLR
from zoo.domain_adaptation.discriminators import DomainDiscriminator
from zoo.policies import MovingAlignment, Threshold

pytestmark = pytest.mark.slow

LENET = partial(Network, backbone="lenet", in_channels=1, arguments={"norm": True})
ADAM = partial(torch.optim.AdamW, lr=0.003, weight_decay=0.01)
COSINE = partial(CosineLR, warmup_steps=30)


@pytest.fixture
def train(tmp_path):
    """Train, and give the trainer back."""

    def run(model: LightningModule, data: LightningDataModule, seed: int, *callbacks: Any) -> Trainer:
        torch.manual_seed(seed)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            callbacks=[EMATeacher(), *callbacks],
            default_root_dir=tmp_path,
        )
        trainer.fit(model, data)
        return trainer

    return run


@pytest.fixture
def score(train):
    """Train, and measure on the test set."""

    def run(model: LightningModule, data: LightningDataModule, seed: int, name: str = "accuracy") -> float:
        trainer = train(model, data, seed)
        return trainer.test(model, data, verbose=False)[0][f"test/{name}"]

    return run


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def common(network: Any = LENET) -> dict[str, Any]:
    return {"network": network, "num_classes": 10, "optimizer": ADAM, "scheduler": COSINE}


def test_fixmatch_beats_its_labels(score) -> None:
    ours, alone = [], []
    policy = partial(Threshold, threshold=0.95, alignment=partial(MovingAlignment, momentum=0.99))
    for seed in (0, 1):
        data = SemiSupervisedData(
            MNIST5k(), labels_per_class=4, batch_size=32, unlabeled_ratio=4, steps=400, val_size=0, seed=seed
        )
        method = FixMatch(policy=policy, momentum=0.98, **common())
        ours.append(score(method, data, seed))
        few = SupervisedData(MNIST5k(), labels_per_class=4, batch_size=32, steps=400, val_size=0, seed=seed)
        alone.append(score(Supervised(momentum=0.98, **common()), few, seed))
    # seen: 0.900, 0.909 against 0.741, 0.814
    assert mean(ours) > mean(alone) + 0.05


class Dim(MNIST5k):
    """The digits in fog."""

    def _dim(self, samples: Samples) -> Samples:
        raw = samples[list(range(len(samples)))]
        return TensorSamples((0.4 * raw["image"].float() + 90).round().to(torch.uint8), raw["label"])

    def train(self) -> Samples:
        return self._dim(super().train())

    def test(self) -> Samples:
        return self._dim(super().test())


def test_dann_crosses_a_shift(score) -> None:
    ours, alone = [], []
    recipe = {
        # no BatchNorm, which would cross this shift by its statistics alone
        "network": partial(Network, backbone="lenet", in_channels=1),
        "num_classes": 10,
        "optimizer": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        "scheduler": InverseDecayLR,
    }
    small = partial(DomainDiscriminator, hidden=100, layers=1, norm=False)
    for seed in (0, 1):
        data = DomainData(MNIST5k(), Dim(), batch_size=32, steps=300, val_size=0, weak=Identity(), seed=seed)
        ours.append(score(DANN(discriminator=small, **recipe), data, seed))
        alone.append(score(SourceOnly(**recipe), data, seed))
    # seen: 0.786, 0.687 against 0.394, 0.494
    assert mean(ours) > mean(alone) + 0.12


def test_a_teacher_helps_the_student(train, score, tmp_path) -> None:
    teacher = Supervised(**common())
    rich = SupervisedData(MNIST5k(), batch_size=64, steps=300, val_size=0, seed=0)
    train(teacher, rich, 0).save_checkpoint(tmp_path / "teacher.ckpt")
    ours, alone = [], []
    for seed in (0, 1):
        data = SupervisedData(MNIST5k(), labels_per_class=5, batch_size=32, steps=300, val_size=0, seed=seed)
        method = KnowledgeDistillation(
            teacher=partial(LENET, weights=str(tmp_path / "teacher.ckpt")), alpha=0.9, temperature=4.0, **common()
        )
        ours.append(score(method, data, seed))
        alone.append(score(Supervised(**common()), data, seed))
    # seen: 0.911, 0.913 against 0.772, 0.827; both saw the same 50 images
    assert mean(ours) > mean(alone) + 0.05


def test_students_beat_their_weak_supervisor(train, score, tmp_path) -> None:
    weak, naive, confident = [], [], []
    for seed in (0, 1):
        half = partial(WeakLabelData, MNIST5k(), batch_size=64, val_size=0, supervisor_share=0.2, seed=seed)
        supervisor = Supervised(**common())
        handicap = half(role="supervisor", view=Downsample(pixels=5), steps=100)
        trainer = train(supervisor, handicap, seed, PredictionWriter(str(tmp_path), csv_name=None))
        weak.append(trainer.test(supervisor, handicap, verbose=False)[0]["test/accuracy"])
        trainer.predict(supervisor, handicap, return_predictions=False)
        data = half(role="student", weak_labels=str(tmp_path / "predictions.safetensors"), steps=200)
        naive.append(score(NaiveWeakToStrong(**common()), data, seed))
        confident.append(score(ConfidenceWeakToStrong(confidence_weight=0.5, **common()), data, seed))
    # seen: supervisor 0.827, 0.779; naive 0.878, 0.829; confident 0.903, 0.877
    assert mean(naive) > mean(weak) + 0.02
    assert mean(confident) > mean(weak) + 0.04


def test_cam_finds_digits_from_tags(train) -> None:
    data = SegmentationData(DigitScenes(train_scenes=2000, test_scenes=100), batch_size=32, steps=500, val_size=0)
    method = CAM(
        network=partial(Network, backbone="seg_cnn"),
        num_classes=10,
        threshold=0.35,
        optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.01),
        scheduler=COSINE,
    )
    trainer = train(method, data, 0)
    trained = trainer.test(method, data, verbose=False)[0]
    torch.manual_seed(0)
    untrained = trainer.test(CAM(network=method.network_recipe, num_classes=10, threshold=0.35), data, verbose=False)[0]
    # seen: refined 0.269, seeds 0.193; untrained 0.089
    assert trained["test/miou_refined"] > trained["test/miou_seed"] + 0.03
    assert trained["test/miou_refined"] > untrained["test/miou_refined"] + 0.08
