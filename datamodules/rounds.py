"""Several domains, and what networks of earlier rounds say of every sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.base import Role
from datamodules.domains import GeneralizationData
from datamodules.samplers import DomainSampler, RepeatSampler, mix
from datamodules.sources.base import MissingData, Samples, Source
from datamodules.weak_labels import match, read_weak_labels
from zoo.core.errors import UserError, suggest


class RoundsData(GeneralizationData):
    """As :class:`~datamodules.domains.GeneralizationData`, with the classes that earlier rounds predicted.

    ``zoo predict`` goes through the training samples and writes the file that later rounds read. All rounds must have
    the same sources, ``seed`` and ``val_size``.

    Batch: ``source`` {image, label, domain, index}, and with rounds ``rounds`` (B, R) int64.

    Args:
        source: the labelled domains, at least one.
        target: the domain that is left out.
        rounds: files of predictions, the first round's first; none for the first round itself.
        sampling: ``"domains"``, as many samples of every domain in a batch; ``"agreement"``, one half where all rounds
            are right or all wrong, and one half where they are not.
        **kwargs: see :class:`~datamodules.domains.GeneralizationData`.

    Raises:
        UserError: for another ``sampling``, or ``agreement`` without rounds or with an odd ``batch_size``; before
            training, where a round was right, or wrong, on every sample, or no two rounds ever differ.
    """

    def __init__(
        self,
        source: Source | list[Source],
        target: Source,
        rounds: list[str] | None = None,
        sampling: Literal["domains", "agreement"] = "domains",
        **kwargs: Any,
    ) -> None:
        super().__init__(source, target, **kwargs)
        if sampling not in ("domains", "agreement"):
            near = suggest(sampling, ["domains", "agreement"])
            raise UserError(f"RoundsData: sampling={sampling!r} must be 'domains' or 'agreement'.{near}")
        if sampling == "agreement" and self.batch_size % 2:
            raise UserError(f"RoundsData: batch_size={self.batch_size} must be even, as sampling='agreement' halves it")
        self.rounds = list(rounds or [])
        self.sampling = sampling

    def make_roles(self) -> dict[str, Role]:
        """One role: ``source``."""
        role = super().make_roles()["source"]
        if not self.rounds:
            if self.sampling == "agreement":
                raise UserError("RoundsData: sampling='agreement' needs rounds, the files of their predictions")
            return {"source": role}
        samples = role.samples
        files = [(name, read_weak_labels(name, self.num_classes)) for name in map(existing, self.rounds)]
        rounds = torch.stack([match(labels, samples.ids, name).argmax(dim=1) for name, labels in files], dim=1)
        right = rounds == samples.labels[:, None]
        for (name, _), share in zip(files, right.float().mean(dim=0).tolist(), strict=True):
            if share in (0.0, 1.0):
                how, instead = ("rightly", "fewer") if share else ("wrongly", "more")
                raise UserError(
                    f"RoundsData: rounds={name!r} predicts all {len(samples)} samples {how}, so that one of its two "
                    f"groups is empty; train that round for {instead} steps"
                )
        return {"source": Role(samples.with_columns(rounds=rounds), role.batch_size, role.views)}

    def make_sampler(self, number: int, role: Role) -> RepeatSampler:
        """As many samples of every domain, or of both kinds, in every batch."""
        if self.sampling == "domains":
            return super().make_sampler(number, role)
        agree = agreement(role.samples.columns["rounds"], role.samples.labels)
        if bool(agree.all()):
            raise UserError(
                "RoundsData: the rounds are right and wrong on the same samples; the last found nothing new"
            )
        seed = mix(self.seed, number)
        return DomainSampler(agree.long(), role.batch_size, self.steps, seed=seed, **self._replicas())

    def prediction_set(self) -> Samples:
        """The training samples of all sources."""
        return self._joined("source")

    @property
    def predicts(self) -> str:
        """``train``, unless a folder is asked for."""
        return "train" if self.predict_folder is None else super().predicts


def agreement(rounds: Tensor, labels: Tensor) -> Tensor:
    """Where all rounds are right or all are wrong, (N,) bool, from predictions (N, R) and labels (N,)."""
    right = rounds == labels[:, None]
    return right.all(dim=1) | ~right.any(dim=1)


def existing(name: str) -> str:
    """The name of a file that is there.

    Raises:
        MissingData: when it is not.
    """
    if not Path(name).is_file():
        raise MissingData(
            f"RoundsData: there is no file rounds={name!r} ({Path(name).resolve()}); zoo predict writes it"
        )
    return name
