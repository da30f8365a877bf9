"""A small network for maps: features every four pixels that see about as far as a digit is tall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from zoo.core.small.staged import StagedNet, build, config

default_cfgs = generate_default_cfgs({"seg_cnn": config(64, first="stem.0.0")})


def _layer(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SegCNN(StagedNet):
    """Five convolutions, stride 4, receptive field 37 pixels.

    A 5×5 of stride 2; a 3×3; two 3×3, the first of stride 2; a 3×3 of dilation 2. Each with batch norm and ReLU.

    Args:
        num_classes: outputs.
        in_chans: channels of the image.
        widths: channels after the stem and after each of the three stages.
        drop_rate: dropout in front of the classifier.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: Sequence[int] = (16, 24, 48, 96),
        drop_rate: float = 0.0,
    ) -> None:
        stem, first, second, third = widths
        stages = [
            _layer(stem, first),
            nn.Sequential(_layer(first, second, stride=2), _layer(second, second)),
            _layer(second, third, dilation=2),
        ]
        super().__init__(
            _layer(in_chans, stem, kernel=5, stride=2), stages, widths[1:], (2, 4, 4), num_classes, drop_rate=drop_rate
        )


@register_model
def seg_cnn(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Five convolutions of stride 4 in total; option ``widths``."""
    return build(SegCNN, "seg_cnn", pretrained, arguments)
