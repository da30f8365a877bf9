"""Views of images: batched on uint8 tensors, and the same one image at a time."""

from datamodules.transforms.views import (
    OPERATION_SETS,
    Channels,
    Compose,
    Downsample,
    Identity,
    Normalize,
    Strong,
    View,
    Weak,
)

__all__ = [
    "OPERATION_SETS",
    "Channels",
    "Compose",
    "Downsample",
    "Identity",
    "Normalize",
    "Strong",
    "View",
    "Weak",
]
