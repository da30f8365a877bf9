"""Features of any samples, by the network that a method would be evaluated with."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.files import by_index, gather_rows
from datamodules.samplers import EvalSampler, Loader
from datamodules.sources.base import Samples, Source
from zoo.core.errors import UserError


def check_source(owner: str, source: Source, trainer: Trainer) -> None:
    """Make a source ready on every machine, and check that its images are such as the network knows.

    Args:
        owner: whose argument the source is, for the message.
        source: to be checked.
        trainer: whose data module says what the network knows.

    Raises:
        UserError: where size, channels or vocabulary differ from the data's.
    """
    if trainer.local_rank == 0:
        source.prepare()
    trainer.strategy.barrier(owner)
    own = getattr(getattr(trainer, "datamodule", None), "source", None)
    if own is not None and (own.size, own.channels) != (source.size, source.channels):
        raise UserError(
            f"{owner}: source={source.name} has {source.channels} channels of size {source.size}, but the network was "
            f"trained on {own.channels} of size {own.size}"
        )
    vocabularies = [getattr(getattr(one, "tokenizer", None), "fingerprint", None) for one in (own, source)]
    if own is not None and vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"{owner}: source={source.name} has not the vocabulary of {own.name}, so that an id is another word in "
            "each; give both the same tokenizer, a file or hf:NAME"
        )


@torch.no_grad()
def features_of(trainer: Trainer, module: LightningModule, samples: Samples) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,), on the CPU, in the samples' order, equal on all ranks.

    Inside a test or validation loop of ``trainer``; the ranks share the samples out.

    Args:
        trainer: in a loop.
        module: a method with a ``predictor`` that has ``features``.
        samples: any labelled samples that look like the data's.

    Raises:
        UserError: where the network has no features.
    """
    predictor: Any = module.predictor
    network = getattr(predictor, "module", predictor)  # an average holds its network
    if not callable(getattr(network, "features", None)):
        raise UserError(f"{type(module).__name__}: {type(network).__name__} has no features()")
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    loader = Loader(samples, EvalSampler(samples, getattr(data, "eval_batch_size", 256)))  # type: ignore[arg-type]
    index, label, features = [], [], []
    for batch in loader:
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        with trainer.precision_plugin.forward_context():
            features.append(network.features(batch["image"]).float())
        index.append(batch["index"])
        label.append(batch["label"])
    device = trainer.strategy.root_device
    rows = by_index(*(gather_rows(torch.cat(part), device) for part in (index, label, features)))
    order = torch.searchsorted(rows[0], samples.ids)
    return rows[2][order], rows[1][order]
