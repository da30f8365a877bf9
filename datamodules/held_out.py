"""A source and a target domain of which some samples are kept apart, unlabelled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.base import Role
from datamodules.domains import DomainData
from datamodules.sources.base import Source
from datamodules.splits import Split, generator
from zoo.core.errors import UserError

HELD_OUT = 6  # purpose of a random stream


class HeldOutDomainData(DomainData):
    """As :class:`~datamodules.domains.DomainData`, with a third role of target samples that the second never has.

    For methods that ask unlabelled target samples which way to go, and must not learn from them. They are none of the
    ``oracle``'s either.

    Batch: ``source`` and ``target`` as ever, ``held_out`` {image, domain, index, hidden_label}.

    Args:
        source: see :class:`~datamodules.domains.DomainData`.
        target: see :class:`~datamodules.domains.DomainData`.
        held_out: the share of the target's training samples that is kept apart, in (0, 1).
        held_out_batch_size: held-out samples a step and process, at least 1; half as many as source samples (and at
            least 2, which BatchNorm needs) unless given, as they cost a pass and teach nothing.
        **kwargs: see :class:`~datamodules.domains.DomainData`.

    Raises:
        UserError: for a share or a size out of its range.
    """

    def __init__(
        self,
        source: Source | list[Source],
        target: Source,
        held_out: float = 0.1,
        held_out_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(source, target, **kwargs)
        if not 0.0 < held_out < 1.0:
            raise UserError(f"HeldOutDomainData: held_out={held_out} must lie in (0, 1), a share of the target")
        if held_out_batch_size is not None and held_out_batch_size < 1:
            raise UserError(f"HeldOutDomainData: held_out_batch_size={held_out_batch_size} must be at least 1, or null")
        self.held_out = held_out
        self.held_out_batch_size = held_out_batch_size or max(self.batch_size // 2, 2)

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs; the held-out samples have the weak view."""
        super().setup(stage)
        if "held_out" in self._roles:
            self._roles["held_out"].views = {"image": self.default_weak(self._strictest)}

    def make_split(self, labels: Tensor) -> Split:
        """The parts of :class:`DomainData`, the target's divided once more."""
        split = super().make_split(labels)
        target = split["target"]
        order = torch.randperm(len(target), generator=generator(self.seed, HELD_OUT))
        count = round(self.held_out * len(target))
        split.parts["held_out"] = target[order[:count]].sort().values
        split.parts["target"] = target[order[count:]].sort().values
        return split

    def make_roles(self) -> dict[str, Role]:
        """Three roles: ``source``, ``target`` and ``held_out``."""
        samples = self._train(self.target).subset(self.parts["held_out"])
        return {**super().make_roles(), "held_out": Role(samples, self.held_out_batch_size, {}, hidden=True)}
