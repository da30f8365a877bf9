"""LeNet-5, as a fully convolutional network."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.core.small.staged import StagedNet, build, config

__all__ = ["LeNet"]

default_cfgs = generate_default_cfgs({"lenet": config(28, channels=1, first="stages.0.conv")})


class Layer(nn.Module):
    """Convolution, optional batch norm, ReLU, optional 2×2 max pooling."""

    def __init__(self, inputs: int, outputs: int, kernel: int, padding: int, norm: bool, pool: bool) -> None:
        super().__init__()
        self.smallest = kernel - 2 * padding + pool  # what leaves one position
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map to map; a map too small for a single position is padded with zeros."""
        height, width = (max(0, self.smallest - size) for size in x.shape[-2:])
        if height or width:
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return self.pool(F.relu(self.norm(self.conv(x)), inplace=True))


class LeNet(StagedNet):
    """LeNet-5 (C1 S2 C3 S4 C5 F6) with ReLU and max pooling; 61,706 parameters at width 1, one channel, ten classes.

    C5 is a 5×5 and F6 a 1×1 convolution, which at 28×28 are exactly the paper's layers and at other sizes are averaged
    over positions. Images of 28 pixels are padded to 32, as in the paper.

    Args:
        num_classes: outputs.
        in_chans: channels of the image.
        width: multiplies the numbers of maps 6, 16, 120, 84.
        norm: batch norm after every convolution.
        drop_rate: dropout in front of the classifier.

    Source: LeCun, Bottou, Bengio and Haffner 1998, doi 10.1109/5.726791, section II.B.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, width: float = 1, norm: bool = False, drop_rate: float = 0.0
    ) -> None:
        c1, c3, c5, f6 = (round(width * count) for count in (6, 16, 120, 84))
        stages = [
            Layer(in_chans, c1, 5, 2, norm, True),
            Layer(c1, c3, 5, 0, norm, True),
            Layer(c3, c5, 5, 0, norm, False),
            Layer(c5, f6, 1, 0, norm, False),
        ]
        super().__init__(nn.Identity(), stages, (c1, c3, c5, f6), (2, 4, 4, 4), num_classes, drop_rate=drop_rate)


@register_model
def lenet(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """LeNet-5; options ``width`` and ``norm``."""
    return build(LeNet, "lenet", pretrained, arguments)
