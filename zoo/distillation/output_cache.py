"""Remembering what a frozen network says about each sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.core.fingerprints import fingerprint


class OutputCache:
    """Outputs of a frozen network by sample index, filled when a sample is first seen.

    Every sample's image is remembered as a 64-bit fingerprint, so that a view which changed is noticed rather than
    answered with what was said about another one. Lives on the device of the data and in no checkpoint: a resumed run
    fills it again.

    Args:
        name: what to call it in the error.
    """

    def __init__(self, name: str = "OutputCache") -> None:
        self.name = name
        self.outputs: Tensor | None = None
        self.fingerprints = torch.zeros(0, dtype=torch.long)
        self.known = torch.zeros(0, dtype=torch.bool)

    @torch.no_grad()
    def __call__(self, network: Callable[[Tensor], Tensor], images: Tensor, index: Tensor) -> Tensor:
        """Outputs (B, C) for ``images`` (B, ...) with the stable numbers ``index`` (B,).

        Raises:
            UserError: if a sample comes with another image than the first time.
        """
        prints = fingerprint(images)
        self._reserve(int(index.max()) + 1, images.device)
        known = self.known[index]
        changed = known & (self.fingerprints[index] != prints)
        if changed.any():
            raise UserError(
                f"{self.name}: sample {int(index[changed][0])} came with another image than before, so its views are "
                "random. Use deterministic views or no cache"
            )
        if not known.all():
            new = ~known
            outputs = network(images[new]).float()
            if self.outputs is None:
                self.outputs = outputs.new_zeros(len(self.known), *outputs.shape[1:])
            self.outputs[index[new]] = outputs
            self.fingerprints[index[new]], self.known[index[new]] = prints[new], True
        assert self.outputs is not None
        return self.outputs[index]

    def _reserve(self, size: int, device: torch.device) -> None:
        """Room for ``size`` samples; doubling keeps the copies few."""
        have = len(self.known)
        if size <= have:
            return
        grown = max(size, 2 * have)
        self.known = _longer(self.known.to(device), grown)
        self.fingerprints = _longer(self.fingerprints.to(device), grown)
        if self.outputs is not None:
            self.outputs = _longer(self.outputs, grown)


def _longer(x: Tensor, rows: int) -> Tensor:
    """The same rows, followed by zeros."""
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
