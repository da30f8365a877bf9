"""BatchNorm that looks at a batch without remembering it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
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


def normalise_by_batch(module: nn.Module) -> list[_BatchNorm]:
    """From now on BatchNorm normalises by the batch at hand, in evaluation mode too, and remembers nothing.

    Where a batch has a single value per channel, one sample at one position, it has no variance: such a batch is
    normalised by the running averages, which stay as they are.

    Args:
        module: whose BatchNorm layers, of any kind, are meant.

    Returns:
        The layers.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        layer.track_running_stats = False
        layer.register_forward_pre_hook(_choose_statistics)
    return layers


def _choose_statistics(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    layer.training = inputs[0].numel() > inputs[0].shape[1]
