import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks import SelectionEvaluation
from zoo.core.errors import UserError

# three problems of four candidates: logits of class 1, and labels
SCORES = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.5, 0.5, 0.1, 0.0], [0.0, 0.1, 0.2, 0.9]])
LABELS = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]])


class Scored(LightningModule):
    """Logits are the input's own."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return torch.stack([torch.zeros_like(x), x] + [x] * (self.classes - 2), dim=1)

    def test_step(self, batch, batch_idx):
        self(batch["image"])


def measured(tmp_path, scores=SCORES, labels=LABELS, order=None, classes=2, **more):
    rows = [
        {"image": s, "label": y, "index": i}
        for i, (s, y) in enumerate(zip(scores.flatten().tolist(), labels.flatten().tolist(), strict=True))
    ]
    rows = rows if order is None else [rows[i] for i in order]
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SelectionEvaluation(**{"candidates": 4} | more)],
    )  # fmt: skip
    return trainer.test(Scored(classes), DataLoader(rows, batch_size=5), verbose=False)[0]  # type: ignore[arg-type]


def test_by_hand(tmp_path):
    # right; of two equal ones one is right; no candidate is
    expected = {"test/selection": (1 + 0.5 + 0) / 3, "test/pass@1": (1 + 2 + 0) / 12, "test/oracle": 2 / 3}
    assert measured(tmp_path) == pytest.approx(expected)


def test_samples_in_any_order_and_problems_that_are_not_whole(tmp_path):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    assert measured(tmp_path, order=order) == pytest.approx(measured(tmp_path))
    expected = {"test/selection": 0.75, "test/pass@1": 3 / 8, "test/oracle": 1.0}
    assert measured(tmp_path, order=range(11)) == pytest.approx(expected)  # the last of the third is missing
    unknown = LABELS.clone()
    unknown[2, 1] = -1
    assert measured(tmp_path, labels=unknown) == pytest.approx(expected)


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="candidates=1 must be at least 2"):
        SelectionEvaluation(candidates=1)
    with pytest.raises(UserError, match="the model has 3"):
        measured(tmp_path, classes=3)
    with pytest.raises(UserError, match="of no problem are all 20"):
        measured(tmp_path, candidates=20)
