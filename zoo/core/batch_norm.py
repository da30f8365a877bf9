"""BatchNorm that looks at a batch without remembering it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_batch_norm(module: nn.Module) -> Iterator[None]:
    r"""Inside, BatchNorm normalises by the batch at hand and its running averages stay as they are.

    What the papers call "batch statistics are not updated" on perturbed or unlabeled inputs. In evaluation mode nothing
    changes: the running averages go on normalising. Nothing is copied and nothing has to be put back.

    Args:
        module: whose BatchNorm layers, of any kind, are meant.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
