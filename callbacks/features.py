"""Features of any samples, by the network that a method would be evaluated with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def has_features(module: LightningModule) -> bool:
    """Whether :func:`network_of` finds a network with features."""
    predictor: Any = module.predictor
    return callable(getattr(getattr(predictor, "module", predictor), "features", None))


def network_of(module: LightningModule) -> Any:
    """The network that a method is evaluated with.

    Raises:
        UserError: where it has no features.
    """
    predictor: Any = module.predictor
    network = getattr(predictor, "module", predictor)  # an average holds its network
    if not has_features(module):
        raise UserError(f"{type(module).__name__}: {type(network).__name__} has no features()")
    return network


@torch.no_grad()
def outputs_of(trainer: Trainer, loader: Any, call: Callable[[Any], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers (B,) of the samples of a loader, and what ``call`` makes of their inputs, (B, ...), batch by batch.

    Args:
        trainer: in a loop.
        loader: batches {image, index, ...}, shared out over the ranks.
        call: a network, its ``features``, or a method.
    """
    for batch in loader:
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        with trainer.precision_plugin.forward_context():
            made = call(batch["image"])
        yield batch["index"], made


def rows_of(trainer: Trainer, loader: Any, call: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """Numbers (N,) of all samples, ascending, and their outputs (N, ...) float32, on the CPU, equal on all ranks."""
    index, outputs = zip(*((i, made.float()) for i, made in outputs_of(trainer, loader, call)), strict=True)
    device = trainer.strategy.root_device
    rows = by_index(gather_rows(torch.cat(index), device), gather_rows(torch.cat(outputs), device))
    return rows[0], rows[1]


def loader_of(trainer: Trainer, samples: Any) -> Loader:
    """Any samples once, in order, shared out over the ranks."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return Loader(samples, EvalSampler(samples, getattr(data, "eval_batch_size", 256)))


def features_of(
    trainer: Trainer, module: LightningModule, samples: Samples, network: Any | None = None
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,), on the CPU, in the samples' order, equal on all ranks.

    Inside a test or validation loop of ``trainer``; the ranks share the samples out.

    Args:
        trainer: in a loop.
        module: a method with a ``predictor`` that has ``features``.
        samples: any labelled samples that look like the data's.
        network: another network than the method's predictor.

    Raises:
        UserError: where the network has no features.
    """
    network = network_of(module) if network is None else network
    index, features = rows_of(trainer, loader_of(trainer, samples), network.features)
    return features[torch.searchsorted(index, samples.ids)], samples.labels


def evenly(count: int, at_most: int | None) -> Tensor:
    """At most so many of ``count`` positions, at equal distances: the same at every call."""
    if at_most is None or count <= at_most:
        return torch.arange(count)
    return torch.arange(at_most) * count // at_most
