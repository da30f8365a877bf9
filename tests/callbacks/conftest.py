from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from zoo.core.card import Card
from zoo.core.method import Method
from zoo.core.teachers import EMA


class Linear(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, num_outputs)
        self.norm = nn.BatchNorm1d(num_outputs)

    def forward(self, x):
        return self.norm(self.layer(x.flatten(1)))


class Plain(Method):
    """A classifier; poisoned indices have an infinite loss."""

    card = Card(title="Plain", year=2000, paper="", family="test", roles=("labeled",))
    poison: int | None = None

    def training_step(self, batch, batch_idx):
        labeled = batch["labeled"]
        loss = cross_entropy(self.network(labeled["image"]), labeled["label"])
        if self.poison is not None:
            loss = loss + torch.where((labeled["index"] == self.poison).any(), torch.inf, 0.0)
        return self.report(supervised=loss)

    def baseline(self):
        return Plain(network=self.network_recipe, num_classes=self.num_classes, optimizer=self.optimizer_recipe)


class Averaged(Plain):
    def build(self) -> None:
        super().build()
        self.teacher = EMA(self.network, 0.5)


class Manual(Averaged):
    """Two optimizers a step."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.network.parameters(), lr=0.1) for _ in range(2)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
        return loss


def collate(rows):
    image, label, index = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"image": image, "label": label, "index": index}


def collate_labeled(rows):
    return {"labeled": collate(rows)}


class Points(LightningDataModule):
    """24 images of 4 pixels, 3 classes; index is 100 + position, and batches of 4."""

    num_classes = 3
    classes = ("one", "two", "three")

    def __init__(self, count: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        label = torch.arange(count) % 3
        image = torch.randn(count, 1, 2, 2, generator=generator) + 2 * torch.eye(4)[label].view(-1, 1, 2, 2)
        self.points = TensorDataset(image, label, torch.arange(count) + 100)
        self.given: list = []

    def loader(self, collate_fn) -> DataLoader:
        return DataLoader(self.points, batch_size=4, collate_fn=collate_fn)

    def train_dataloader(self):
        return self.loader(collate_labeled)

    def val_dataloader(self):
        return {"val": self.loader(collate)}

    def test_dataloader(self):
        return {"test": self.loader(collate)}

    def predict_dataloader(self):
        return self.loader(collate)

    def pseudo_label_dataloader(self):
        return self.loader(collate)

    def set_pseudo_labels(self, index, probabilities) -> None:
        self.given.append((index.clone(), probabilities.clone()))


@pytest.fixture
def points():
    return Points


@pytest.fixture
def method():
    kinds = {"plain": Plain, "averaged": Averaged, "manual": Manual}

    def make(kind: str = "plain", **arguments):
        torch.manual_seed(0)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        return kinds[kind](**{"network": Linear, "num_classes": 3, "optimizer": optimizer, **arguments})

    return make


@pytest.fixture
def trainer(tmp_path: Path):
    def make(*callbacks, **arguments) -> Trainer:
        return Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "callbacks": list(callbacks),
                "default_root_dir": tmp_path,
                "max_epochs": 1,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "num_sanity_val_steps": 0,
                **arguments,
            }
        )

    return make


@pytest.fixture
def two_ranks():
    return {"strategy": "ddp_fork", "devices": 2}
