from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from zoo.core.hooks import PER_STEP, skip_empty_hooks
from zoo.semi_supervised.supervised import Supervised


class Small(nn.Sequential):
    def __init__(self, classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(4, classes))


class Counting(Callback):
    """Overrides one hook, and calls the empty one of the base class."""

    def __init__(self) -> None:
        self.calls, self.names = 0, set()

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.calls += 1
        self.names.add(pl_module._current_fx_name)


def test_only_empty_hooks_are_marked() -> None:
    callback = Counting()
    callback.on_before_backward = print  # given to the instance, as LambdaCallback does
    skip_empty_hooks(callback)
    skip_empty_hooks(callback)
    assert callable(callback.on_train_batch_end)
    assert callback.on_before_backward is print
    others = [name for name in PER_STEP if name not in ("on_train_batch_end", "on_before_backward")]
    assert all(getattr(callback, name) is None for name in others)
    assert all(callable(getattr(Callback, name)) for name in PER_STEP)


def test_hooks_run_as_ever(tmp_path) -> None:
    callback = Counting()
    batch = {"labeled": {"image": torch.randn(4, 1, 2, 2), "label": torch.tensor([0, 1, 0, 1])}}
    method = Supervised(network=Small, num_classes=2, optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
    )
    trainer.fit(method, DataLoader([batch] * 3, batch_size=None))
    assert callback.calls == 3
    assert callback.names == {"on_train_batch_end"}
    assert callback.on_after_backward is None


@pytest.mark.parametrize("value", [nn.Linear(2, 2), nn.Parameter(torch.zeros(2))])
def test_other_attributes_are_registered(value) -> None:
    method = Supervised(network=Small, num_classes=2)
    method.thing = value
    assert any(name.startswith("thing") for name in method.state_dict())
