"""Small networks of the literature, registered with timm: importing this package makes their names known to it."""

from zoo.core.small import cifar_resnet, lenet, seg_cnn, tiny, vit, wide_resnet
from zoo.core.small.staged import StagedNet

__all__ = ["NAMES", "StagedNet"]

#: The names that this package adds to timm's.
NAMES: tuple[str, ...] = tuple(
    sorted(name for m in (cifar_resnet, lenet, seg_cnn, tiny, vit, wide_resnet) for name in m.default_cfgs)
)
