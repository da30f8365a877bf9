"""Networks small enough for unit tests: one with batch norm, one whose samples do not see each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.core.errors import UserError
from zoo.core.small.staged import StagedNet, build, config

__all__ = ["TinyCNN", "TinyMLP"]

default_cfgs = generate_default_cfgs(
    {"tiny_cnn": config(28, first="stages.0.0"), "tiny_mlp": config(28, first="stages.0.1")},
)


class TinyCNN(StagedNet):
    """Three times 3×3 convolution of stride 2, batch norm, ReLU.

    Args:
        num_classes: outputs.
        in_chans: channels of the image.
        width: channels of the first convolution; the next have two and four times as many.
        drop_rate: dropout in front of the classifier.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 8, drop_rate: float = 0.0) -> None:
        widths = [in_chans, width, 2 * width, 4 * width]
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in pairwise(widths)
        ]
        super().__init__(nn.Identity(), stages, widths[1:], (2, 4, 8), num_classes, drop_rate=drop_rate)


class Shrink(nn.Module):
    """Mean over a grid of cells, flattened to (B, C·side², 1, 1)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to (B, C·side², 1, 1)."""
        return F.adaptive_avg_pool2d(x, self.side).flatten(1)[:, :, None, None]


class LayerNormChannels(nn.LayerNorm):
    """Layer norm over the channels of (B, C, h, w)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of torch's own
        """Map to map."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class TinyMLP(StagedNet):
    """Layers with layer norm on an 8×8 mean of the image: a sample's output depends on that sample alone.

    Args:
        num_classes: outputs.
        in_chans: channels of the image.
        width: of the layers.
        side: of the grid that the image is averaged to.
        layers: how many, at least 1.
        norm: layer norm in front of every activation.
        drop_rate: dropout in front of the classifier.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 32,
        side: int = 8,
        layers: int = 2,
        norm: bool = True,
        drop_rate: float = 0.0,
    ) -> None:
        if layers < 1:
            raise UserError(f"tiny_mlp: layers={layers} must be at least 1")
        widths = [in_chans * side**2, *[width] * layers]
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 1), LayerNormChannels(b) if norm else nn.Identity(), nn.GELU())
            for a, b in pairwise(widths)
        ]
        stages[0].insert(0, Shrink(side))
        super().__init__(nn.Identity(), stages, widths[1:], (28,) * layers, num_classes, drop_rate=drop_rate)


@register_model
def tiny_cnn(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Three convolutions with batch norm; option ``width``."""
    return build(TinyCNN, "tiny_cnn", pretrained, arguments)


@register_model
def tiny_mlp(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Layers with layer norm; options ``width``, ``side``, ``layers`` and ``norm``."""
    return build(TinyMLP, "tiny_mlp", pretrained, arguments)
