import csv

import pytest
import torch
from safetensors.torch import load_file

from callbacks import PredictionWriter
from zoo.core.errors import UserError


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_writes_a_table_and_tensors(method, points, trainer, tmp_path) -> None:
    model = method()
    output = trainer(PredictionWriter(probabilities=True)).predict(model, points())
    expected = torch.cat([batch["probabilities"] for batch in output])
    tensors = load_file(tmp_path / "predictions.safetensors")
    assert set(tensors) == {"index", "probabilities"}
    assert tensors["index"].tolist() == list(range(100, 124))
    assert torch.equal(tensors["probabilities"], expected)
    rows = table(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["index", "label", "confidence", "p(one)", "p(two)", "p(three)"]
    for row, probabilities in zip(rows, expected, strict=True):
        assert row["label"] == points.classes[int(probabilities.argmax())]
        assert float(row["confidence"]) == pytest.approx(float(probabilities.max()), abs=1e-6)
        assert [float(row[f"p({name})"]) for name in points.classes] == pytest.approx(probabilities.tolist(), abs=1e-6)


def test_paths_of_a_folder(method, trainer, tmp_path) -> None:
    from PIL import Image

    from datamodules import SupervisedData
    from datamodules.sources import Blobs

    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b, quoted", "a", "ä"):
        Image.new("L", (2, 2)).save(folder / f"{name}.png")
    data = SupervisedData(Blobs(size=2, num_classes=3), predict_folder=str(folder))
    trainer(PredictionWriter(folder=str(tmp_path / "out"), tensors_name=None)).predict(method(), data)
    rows = table(tmp_path / "out" / "predictions.csv")
    assert [row["path"] for row in rows] == [str(folder / f"{name}.png") for name in ("a", "b, quoted", "ä")]
    assert {row["label"] for row in rows} <= {"blob 0", "blob 1", "blob 2"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]


@pytest.mark.parametrize("count", [24, 21])
def test_two_processes_write_every_sample_once(method, points, trainer, tmp_path, two_ranks, count) -> None:
    trained = trainer(PredictionWriter(), **two_ranks)
    trained.predict(method(), points(count), return_predictions=False)
    rows = table(tmp_path / "predictions.csv")
    assert [int(row["index"]) for row in rows] == list(range(100, 100 + count))
    one = trainer().predict(method(), points(count))
    expected = torch.cat([batch["probabilities"] for batch in one])
    assert torch.allclose(load_file(tmp_path / "predictions.safetensors")["probabilities"], expected, atol=1e-6)


def test_refuses_what_is_no_classification(method, points, trainer) -> None:
    model = method()
    model.predict_step = lambda batch, batch_idx: {"index": batch["index"], "probabilities": torch.zeros(4, 3, 2, 2)}
    with pytest.raises(UserError, match=r"Plain gave probabilities \(4, 3, 2, 2\)"):
        trainer(PredictionWriter()).predict(model, points())


def test_names_of_other_classes_are_not_taken(method, points, trainer, tmp_path) -> None:
    """Two columns, where the data has three classes: numbers name them, and the tensors claim no classes."""
    from safetensors import safe_open

    model = method()
    model.predict_step = lambda batch, batch_idx: {
        "index": batch["index"],
        "probabilities": torch.tensor([[0.25, 0.75]]).expand(len(batch["index"]), 2),
        "weights": torch.ones(len(batch["index"])),
    }
    trainer(PredictionWriter()).predict(model, points())
    assert {row["label"] for row in table(tmp_path / "predictions.csv")} == {"1"}
    with safe_open(tmp_path / "predictions.safetensors", "pt") as file:
        assert "classes" not in (file.metadata() or {})
        assert sorted(file.keys()) == ["index", "probabilities", "weights"]
