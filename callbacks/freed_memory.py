"""On the CPU, memory that was freed stays with the process."""

from __future__ import annotations

import ctypes
import os
import sys

from lightning.pytorch import Callback, LightningModule, Trainer

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_LIMIT = 2**30


class KeepFreedMemory(Callback):
    """Lets a step on the CPU take the memory that the step before it has freed.

    The C library gives tensors above 32 MiB, and what is free at the end of its heap, back to the system at once, and
    the next step pays for every page again: as much as multiplying what lies in it. Up to 1 GiB is kept instead. The
    peak is the same. It costs nothing else and changes no number.

    It works with the GNU C library's own allocator, and leaves the process as it is elsewhere, on other accelerators,
    and where ``GLIBC_TUNABLES``, ``MALLOC_MMAP_THRESHOLD_`` or ``MALLOC_TRIM_THRESHOLD_`` say otherwise.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before training."""
        chosen = any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"))
        if chosen or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
            return
        if stage == "fit" and sys.platform == "linux" and trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()


def keep_freed_memory() -> bool:
    """Whether the C library has taken the limits."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # The second without the first would stop the library from learning the first by itself.
    return bool(library.mallopt(_MMAP_THRESHOLD, _LIMIT) and library.mallopt(_TRIM_THRESHOLD, _LIMIT))
