"""Wide residual networks for small images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.core.small.staged import StagedNet, build, config

__all__ = ["WideResNet"]

SHAPES = {
    f"wrn_{depth}_{width}": (depth, width) for depth, width in ((10, 1), (16, 1), (16, 2), (28, 2), (40, 1), (40, 2))
}
default_cfgs = generate_default_cfgs({name: config(32) for name in SHAPES})


class Block(nn.Module):
    """Pre-activation block: norm, activation, 3×3, norm, activation, dropout, 3×3, plus the shortcut.

    Where the width changes, the shortcut is a 1×1 convolution, of the activated input if ``activate_shortcut``.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: dict[str, Any], slope: float, drop: float, activated: bool
    ) -> None:
        super().__init__()
        self.slope, self.drop, self.activated = slope, drop, activated
        self.norm1 = nn.BatchNorm2d(inputs, **norm)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, **norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Map to map."""
        active = F.leaky_relu(self.norm1(x), self.slope, inplace=True)
        hidden = F.leaky_relu(self.norm2(self.conv1(active)), self.slope, inplace=True)
        hidden = self.conv2(F.dropout(hidden, self.drop, self.training))
        return hidden + (x if self.shortcut is None else self.shortcut(active if self.activated else x))


class Final(nn.Module):
    """The last norm and activation."""

    def __init__(self, width: int, norm: dict[str, Any], slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.norm = nn.BatchNorm2d(width, **norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map to map."""
        return F.leaky_relu(self.norm(x), self.slope, inplace=True)


class WideResNet(StagedNet):
    """WRN-depth-width: three stages of (depth - 4) / 6 pre-activation blocks with 16, 32, 64 times ``width`` channels.

    The defaults are the original's, with torch's batch norm. The semi-supervised literature's WRN-28-2 (FixMatch) has
    ``leaky_slope=0.1, norm_momentum=0.001, norm_eps=0.001, activate_shortcut=False``: a momentum that slow needs the
    long trainings of those papers. (TorchSSL's copy also skips the first norm and activation where stages 2 and 3
    widen, which leaves parameters without gradients; this one does not. Convolutions have no biases.)

    Args:
        depth: 6 n + 4.
        width: multiplies the channels.
        num_classes: outputs.
        in_chans: channels of the image.
        leaky_slope: negative slope of the activation; 0 is ReLU.
        norm_momentum: share of the batch in batch norm's running statistics.
        norm_eps: added to batch norm's variance.
        activate_shortcut: whether every shortcut convolution sees the activated input; otherwise only the first does.
        block_drop: dropout inside the blocks.
        drop_rate: dropout in front of the classifier.

    Raises:
        ValueError: when depth - 4 is no positive multiple of 6.

    Source: Zagoruyko and Komodakis 2016, arXiv 1605.07146; semi-supervised details: Sohn et al. 2020, arXiv 2001.07685.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 2,
        num_classes: int = 10,
        in_chans: int = 3,
        leaky_slope: float = 0.0,
        norm_momentum: float = 0.1,
        norm_eps: float = 1e-5,
        activate_shortcut: bool = True,
        block_drop: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"WideResNet: depth={depth}, must be 6 n + 4 with n ≥ 1 (10, 16, 22, 28, …)")
        norm: dict[str, Any] = {"momentum": norm_momentum, "eps": norm_eps}
        widths = [16, 16 * width, 32 * width, 64 * width]
        stages = [
            nn.Sequential(
                *(
                    Block(
                        widths[i] if j == 0 else widths[i + 1],
                        widths[i + 1],
                        2 if i and j == 0 else 1,
                        norm,
                        leaky_slope,
                        block_drop,
                        activate_shortcut or i == 0,
                    )
                    for j in range(blocks)
                )
            )
            for i in range(3)
        ]
        stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        final = Final(widths[-1], norm, leaky_slope)
        super().__init__(stem, stages, widths[1:], (1, 2, 4), num_classes, final, drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=leaky_slope, mode="fan_out", nonlinearity="leaky_relu")


def build_wrn(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    """Build the network of that name."""
    depth, width = SHAPES[name]
    return build(WideResNet, name, pretrained, arguments, depth=depth, width=width)


@register_model
def wrn_10_1(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """WRN-10-1, for tests and quick looks."""
    return build_wrn("wrn_10_1", pretrained, arguments)


@register_model
def wrn_16_1(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """WRN-16-1."""
    return build_wrn("wrn_16_1", pretrained, arguments)


@register_model
def wrn_16_2(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """WRN-16-2."""
    return build_wrn("wrn_16_2", pretrained, arguments)


@register_model
def wrn_28_2(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """WRN-28-2, the semi-supervised literature's."""
    return build_wrn("wrn_28_2", pretrained, arguments)


@register_model
def wrn_40_1(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """WRN-40-1."""
    return build_wrn("wrn_40_1", pretrained, arguments)


@register_model
def wrn_40_2(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """WRN-40-2."""
    return build_wrn("wrn_40_2", pretrained, arguments)
