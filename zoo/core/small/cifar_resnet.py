"""The residual networks for small images that the distillation literature uses."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.core.small.staged import StagedNet, build, config

__all__ = ["CifarResNet"]

SHAPES = {f"resnet{depth}_cifar": (depth, 1) for depth in (8, 14, 20, 32, 44, 56, 110)}
SHAPES |= {"resnet8x4_cifar": (8, 4), "resnet32x4_cifar": (32, 4)}
default_cfgs = generate_default_cfgs({name: config(32, first="stem.0") for name in SHAPES})


class Block(nn.Module):
    """3×3, norm, ReLU, 3×3, norm, plus the shortcut, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map to map."""
        hidden = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        return F.relu(hidden + self.shortcut(x), inplace=True)


class CifarResNet(StagedNet):
    """ResNet-depth: three stages of (depth - 2) / 6 basic blocks with 16, 32, 64 times ``width`` channels.

    ``resnet8x4`` and ``resnet32x4`` have ``width=4`` and a stem of 32 channels.

    Args:
        depth: 6 n + 2.
        width: multiplies the channels of the stages.
        num_classes: outputs.
        in_chans: channels of the image.
        drop_rate: dropout in front of the classifier.

    Raises:
        ValueError: when depth - 2 is no positive multiple of 6.

    Source: He et al. 2016, arXiv 1512.03385, section 4.2; shortcuts are 1×1 convolutions and the wide ones are those of
    Tian, Krishnan and Isola 2020, arXiv 1910.10699.
    """

    def __init__(
        self, depth: int = 20, width: int = 1, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0
    ) -> None:
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"CifarResNet: depth={depth}, must be 6 n + 2 with n ≥ 1 (8, 14, 20, 26, …)")
        widths = [16 if width == 1 else 8 * width, 16 * width, 32 * width, 64 * width]
        stages = [
            nn.Sequential(
                Block(widths[i], widths[i + 1], 2 if i else 1),
                *(Block(widths[i + 1], widths[i + 1], 1) for _ in range(blocks - 1)),
            )
            for i in range(3)
        ]
        stem = nn.Sequential(
            nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        super().__init__(stem, stages, widths[1:], (1, 2, 4), num_classes, drop_rate=drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_resnet(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    """Build the network of that name."""
    depth, width = SHAPES[name]
    return build(CifarResNet, name, pretrained, arguments, depth=depth, width=width)


@register_model
def resnet8_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-8, for small images."""
    return build_resnet("resnet8_cifar", pretrained, arguments)


@register_model
def resnet14_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-14, for small images."""
    return build_resnet("resnet14_cifar", pretrained, arguments)


@register_model
def resnet20_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-20, for small images."""
    return build_resnet("resnet20_cifar", pretrained, arguments)


@register_model
def resnet32_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-32, for small images."""
    return build_resnet("resnet32_cifar", pretrained, arguments)


@register_model
def resnet44_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-44, for small images."""
    return build_resnet("resnet44_cifar", pretrained, arguments)


@register_model
def resnet56_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-56, for small images."""
    return build_resnet("resnet56_cifar", pretrained, arguments)


@register_model
def resnet110_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-110, for small images."""
    return build_resnet("resnet110_cifar", pretrained, arguments)


@register_model
def resnet8x4_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-8 with four times the channels, for small images."""
    return build_resnet("resnet8x4_cifar", pretrained, arguments)


@register_model
def resnet32x4_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-32 with four times the channels, for small images."""
    return build_resnet("resnet32x4_cifar", pretrained, arguments)
