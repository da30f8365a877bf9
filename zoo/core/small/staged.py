"""What our small networks share: stem, stages, final layer, mean over positions, classifier; with timm's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg
from torch import Tensor, nn

__all__ = ["StagedNet", "build", "config"]


class StagedNet(nn.Module):
    """Stem, stages, final normalisation, mean over positions, classifier; any image size.

    Args:
        stem: image (B, C, H, W) to the first map.
        stages: map to map, one a stage; their outputs are the feature maps.
        widths: channels of every stage's output.
        strides: image pixels per position after every stage.
        num_classes: outputs; 0 leaves the classifier out.
        final: what follows the last stage (a pre-activation network's last norm and activation).
        drop_rate: dropout in front of the classifier.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        widths: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        final: nn.Module | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.drop_rate = drop_rate
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"stages.{i}"}
            for i, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.final = final or nn.Identity()
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer; ``num_classes=0`` removes it. Pooling is always the mean."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The output of every stage, what feature distillation compares; the last one before ``final``."""
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The interface of timm to :meth:`feature_maps`: all of them, the last ``indices``, or those listed."""
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates: output_fmt={output_fmt!r}, must be 'NCHW'")
        maps = self.feature_maps(x)
        last = self.final(maps[-1])
        if norm:
            maps[-1] = last
        if isinstance(indices, int):
            maps = maps[-indices:]
        elif indices is not None:
            maps = [maps[i] for i in indices]
        return maps if intermediates_only else (last, maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map (B, D, h, w)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map to logits (B, C), or to features (B, D)."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to logits (B, C)."""
        return self.forward_head(self.forward_features(x))


def config(size: int, channels: int = 3, first: str = "stem", **more: Any) -> dict[str, Any]:
    """What timm is told about a network: no weights to download, image size, names of the first and last layer."""
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (channels, size, size),
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "first_conv": first,
        "classifier": "fc",
        **more,
    }


def build(cls: type[nn.Module], name: str, pretrained: bool, arguments: dict[str, Any], **defaults: Any) -> nn.Module:
    """Let timm build ``cls`` with the ``arguments`` over the ``defaults``."""
    feature_cfg = {"feature_cls": "getter"}
    return build_model_with_cfg(cls, name, pretrained, feature_cfg=feature_cfg, **{**defaults, **arguments})
