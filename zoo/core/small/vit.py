"""A vision transformer for small images."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from zoo.core.small.staged import config

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {"vit_tiny_cifar": config(32, first="patch_embed.proj", classifier="head", fixed_input_size=True)},
)


@register_model
def vit_tiny_cifar(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ViT-Ti (192 wide, 12 blocks, 3 heads) on patches of 4 pixels; other image sizes by interpolating positions."""
    defaults = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
        "dynamic_img_size": True,
    }
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    settings = {**defaults, **arguments}
    return build_model_with_cfg(VisionTransformer, "vit_tiny_cifar", pretrained, feature_cfg=feature_cfg, **settings)
