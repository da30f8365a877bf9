"""The method: one step, what it measures and what it predicts."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules.segmentation import SegmentationData
from datamodules.sources.digit_scenes import DigitScenes
from zoo.core.network import Network
from zoo.weak_segmentation import CAM


def make(**arguments):
    torch.manual_seed(0)
    recipe = partial(Network, backbone="seg_cnn", arguments={"widths": (4, 4, 8, 8)})
    return CAM(network=recipe, **{"num_classes": 10, "dilations": (1, 2), "iterations": 2, **arguments})


def data():
    return SegmentationData(
        DigitScenes(train_scenes=24, test_scenes=8, size=32), batch_size=8, steps=2, val_size=8, eval_batch_size=4
    )


def trainer(tmp_path, **arguments):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(default_root_dir=tmp_path, **{**quiet, "accelerator": "cpu", "max_epochs": 1, **arguments})


def test_the_loss_is_the_soft_margin_of_the_tags():
    method = make()
    method.configure_model()
    image, tags = torch.rand(4, 3, 32, 32), (torch.rand(4, 10) > 0.7).float()
    loss = method.training_step({"weak": {"image": image, "tags": tags}}, 0)
    z = method.network(image).double()
    expected = -(tags * z.sigmoid().log() + (1 - tags) * (-z).sigmoid().log()).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_fit_and_test_name_their_metrics(tmp_path):
    run, method = trainer(tmp_path), make()
    run.fit(method, data())
    names = {"miou_seed", "miou_refined", "miou_untagged", "tag_map"}
    assert {f"val/{name}" for name in names} <= set(run.callback_metrics)
    (results,) = run.test(method, data(), verbose=False)
    assert set(results) == {f"test/{name}" for name in names}
    assert all(0 <= value <= 1 for value in results.values())


def test_hidden_masks_never_matter(tmp_path):
    class Poisoned(SegmentationData):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            batch = super().on_after_batch_transfer(batch, dataloader_idx)
            if "weak" in batch:
                batch["weak"]["hidden_mask"].fill_(7)
            return batch

    weights = []
    for kind in (SegmentationData, Poisoned):
        method = make()
        source = DigitScenes(train_scenes=24, test_scenes=8, size=32)
        run = trainer(tmp_path, limit_val_batches=0)
        run.fit(method, kind(source, batch_size=8, steps=3, val_size=8))
        weights.append(torch.cat([p.detach().flatten() for p in method.parameters()]))
    assert torch.equal(*weights)


def test_prediction_holds_masks_of_given_or_found_tags():
    method = make()
    method.configure_model()
    method.eval()
    image, tags = torch.rand(3, 3, 32, 32), torch.zeros(3, 10)
    tags[0, 4] = 1
    with torch.no_grad():
        made = method.predict_step({"image": image, "tags": tags, "index": torch.arange(3)}, 0)
        found = method.predict_step({"image": image, "index": torch.arange(3)}, 0)
    assert made["mask"].shape == (3, 32, 32)
    assert set(made["mask"][0].unique().tolist()) <= {0, 5}
    assert made["mask"][1:].abs().sum() == 0  # no tags, no objects
    assert set(made["pseudo_label"].unique().tolist()) <= {0, 5, 255}
    assert found["probabilities"].shape == (3, 10)
    shown = {label - 1 for label in found["mask"].unique().tolist() if label}
    assert shown <= set((found["probabilities"] > 0.5).any(0).nonzero().flatten().tolist())


def test_one_class():
    method = make(num_classes=1)
    method.configure_model()
    image = torch.rand(2, 3, 32, 32)
    batch = {"image": image, "tags": torch.ones(2, 1), "mask": torch.ones(2, 32, 32).long(), "index": torch.arange(2)}
    assert method.training_step({"weak": batch}, 0).isfinite()
    method.eval()
    metrics = method.build_metrics()
    method.evaluate(batch, metrics)
    assert metrics.compute()["miou_seed"].isfinite()


def test_the_truth_itself_scores_one():
    metrics = make().build_metrics()
    truth = torch.randint(0, 11, (2, 16, 16))
    truth[:, 0] = 255
    metrics["miou_seed"].update(torch.where(truth == 255, 0, truth), truth)
    assert metrics["miou_seed"].compute().item() == pytest.approx(1)


@pytest.mark.parametrize("arguments", [{"threshold": 1.5}, {"confident": (0.7, 0.25)}])
def test_refusals(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(**arguments)
