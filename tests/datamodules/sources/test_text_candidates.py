import json

import pytest
import torch
from safetensors.torch import save_file

from datamodules import CandidateData, TextCandidates, TextTable, WeakLabelData
from datamodules.labeling import Custom, Keywords
from datamodules.transforms import Identity
from zoo.core.errors import UserError


def good(text):
    return 1 if "good" in text else 0


def loud(text):
    return 1 if "!" in text else None


TRAIN = ["good !", "bad", "so good", "bad !", "poor", "good good", "no good !"]
TEST = ["bad", "good !", "worse", "fine", "good"]


def table(tmp_path):
    for part, texts in (("train", TRAIN), ("test", TEST)):
        rows = [{"text": text, "label": "positive" if "good" in text else "negative"} for text in texts]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextTable(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"))


def candidates(tmp_path, **more):
    functions = [Custom(good, of="texts"), Custom(loud, of="texts")]
    return TextCandidates(table(tmp_path), **{"functions": functions, "candidates": 3} | more)


def test_groups_in_the_order_of_the_texts(tmp_path):
    source = candidates(tmp_path)
    source.prepare()
    assert source.classes == ("negative", "positive")
    assert source.verifier_names == ["good", "loud"]
    train, test = source.train(), source.test()
    nan = float("nan")
    first = torch.tensor([[1, 0, 1], [0, 0, 1], [1, nan, nan]])  # what is left over is filled up
    second = torch.tensor([[1, nan, nan], [1, nan, nan], [1, nan, nan]])
    torch.testing.assert_close(train.scores, torch.stack([first, second], dim=2), equal_nan=True)
    assert train.correct.tolist() == [[1, 0, 1], [0, 0, 1], [1, -1, -1]]
    torch.testing.assert_close(test.scores[0, :, 0], torch.tensor([0.0, 1.0, 0.0]))  # and left out
    assert test.correct.tolist() == [[0, 1, 0]]


def test_what_is_said_of_candidates_are_weak_labels_of_the_texts(tmp_path):
    """By number and by the names of the classes."""
    data = CandidateData(candidates(tmp_path))
    data.setup("fit")
    assert len(data.prediction_set()) == 3
    assert data.classes == ("negative", "positive")
    right = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0, 0])
    said = {
        "index": torch.arange(9),
        "probabilities": torch.nn.functional.one_hot(right, 2).float(),
        "weights": (torch.arange(9) < 7).float(),
    }
    save_file(said, tmp_path / "said.safetensors", {"samples": "train", "classes": json.dumps(data.classes)})
    student = WeakLabelData(
        table(tmp_path), role="student", weak_labels=str(tmp_path / "said.safetensors"), weak=Identity(), val_size=1,
        supervisor_share=0.3, batch_size=2, steps=1,
    )  # fmt: skip
    student.setup("fit")
    samples = student.roles["weak"].samples
    assert len(samples) >= 3
    batch = samples[range(len(samples))]
    torch.testing.assert_close(batch["probabilities"].argmax(dim=1), right[batch["index"]])


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="candidates=1 must be at least 2"):
        candidates(tmp_path, candidates=1)
    with pytest.raises(UserError, match="functions is empty"):
        candidates(tmp_path, functions=[])
    with pytest.raises(UserError, match="reads image"):
        candidates(tmp_path, functions=[Custom(good, of="image")])
    lonely = Keywords(["good"], label=7)
    with pytest.raises(UserError, match="label=7"):
        candidates(tmp_path, functions=[lonely]).prepare()
    three = tmp_path / "three.jsonl"
    three.write_text("".join(json.dumps({"text": f"a {x}", "label": x}) + "\n" for x in "xyzxyz"))
    source = TextCandidates(TextTable(str(three), str(three)), [Custom(good, of="texts")])
    with pytest.raises(UserError, match="3 classes"):
        source.prepare()
