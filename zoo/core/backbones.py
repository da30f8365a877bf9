"""One factory for feature extractors of timm, torchvision, open_clip and transformers, behind one interface."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import suggest
from zoo.core.weights import WeightsError, choose_part, find_weights, load_into, unreachable

__all__ = ["Backbone", "create_backbone"]


class Backbone(nn.Module):
    """Turns inputs into features; the wrapped network is ``model``.

    Attributes:
        num_features: D of :meth:`features`.
        num_dense_features: D of :meth:`tokens` and :meth:`dense`. It differs from ``num_features`` only where the library's
            network has a hidden layer behind the pooling (MobileNetV3, open_clip's projection).
        in_channels: channels of the image; ``None`` for text.
        classifier_names: parameters of the library's own classifier, left out here.
    """

    num_features: int
    num_dense_features: int
    in_channels: int | None = 3
    classifier_names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def features(self, x: Any) -> Tensor:
        """Inputs to one vector each (B, D)."""
        raise NotImplementedError

    def tokens(self, x: Any) -> Tensor:
        """Inputs to the vectors of their positions (B, N, D), in reading order, without class tokens for images."""
        return self.dense(x).flatten(2).transpose(1, 2)

    def dense(self, x: Any) -> Tensor:
        """Images to a map of vectors (B, D, h, w)."""
        raise NotImplementedError

    def feature_maps(self, x: Any) -> list[Tensor]:
        """Images to the maps of successive stages [(B, D_i, h_i, w_i)], the shallowest first."""
        raise NotImplementedError(f"{type(self).__name__} gives no feature maps")

    def forward(self, x: Any) -> Tensor:
        """Inputs to :meth:`features`."""
        return self.features(x)


class TimmBackbone(Backbone):
    """A timm network, without its classifier.

    Args:
        model: built with ``num_classes=0``.
        in_channels: channels of the image.
        classifier_names: its classifier's modules before they were left out.
    """

    def __init__(self, model: Any, in_channels: int) -> None:
        super().__init__(model)
        self.in_channels = in_channels
        names = model.pretrained_cfg.get("classifier") or ()
        self.classifier_names = (names,) if isinstance(names, str) else tuple(names)
        self.num_dense_features = model.num_features
        self.num_features = getattr(model, "head_hidden_size", model.num_features)
        self.channels_first = getattr(model, "output_fmt", "NCHW") != "NHWC"
        self.prefix = getattr(model, "num_prefix_tokens", 0)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, D)."""
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)

    def tokens(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the vectors of their positions (B, N, D)."""
        return self.positions(self.model.forward_features(x))

    def dense(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to a map (B, D, h, w)."""
        maps = self.model.forward_features(x)
        if maps.dim() == 4:
            return maps if self.channels_first else maps.permute(0, 3, 1, 2)
        tokens = self.positions(maps)
        height, width = self.grid(x.shape[-2:], tokens.shape[1])
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def positions(self, maps: Tensor) -> Tensor:
        """Output of ``forward_features``, whatever its layout, to (B, N, D)."""
        if maps.dim() == 4:
            return maps.flatten(2).transpose(1, 2) if self.channels_first else maps.flatten(1, 2)
        return maps.unsqueeze(1) if maps.dim() == 2 else maps[:, self.prefix :]

    def grid(self, size: torch.Size, count: int) -> tuple[int, int]:
        """Rows and columns of ``count`` tokens of an image of this size."""
        patches = getattr(self.model, "patch_embed", None)
        if hasattr(patches, "dynamic_feat_size"):
            height, width = patches.dynamic_feat_size(tuple(size))
        else:
            height = width = math.isqrt(count)
        if height * width != count:
            raise ValueError(f"dense: {count} tokens of {type(self.model).__name__} form no {height}×{width} grid")
        return height, width

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Images to the maps of successive stages [(B, D_i, h_i, w_i)]."""
        if not hasattr(self.model, "forward_intermediates"):
            return super().feature_maps(x)
        return list(self.model.forward_intermediates(x, intermediates_only=True))


class TorchvisionBackbone(Backbone):
    """A torchvision classification network, without its classifier.

    Args:
        model: with the classifier's last linear layer replaced by the identity.
        num_features: what that layer took in.
        in_channels: channels of the image.
        classifier_names: where the layer was.
    """

    def __init__(
        self, model: nn.Module, num_features: int, in_channels: int, classifier_names: tuple[str, ...]
    ) -> None:
        super().__init__(model)
        self.num_features = num_features
        self.in_channels = in_channels
        self.classifier_names = classifier_names
        self.channels_last_map = type(model).__name__ == "SwinTransformer"
        self.num_dense_features = num_features

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, D)."""
        return self.model(x)

    def dense(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to a map (B, D, h, w)."""
        model: Any = self.model
        if hasattr(model, "features"):
            maps = model.features(x)
            return model.norm(maps).permute(0, 3, 1, 2) if self.channels_last_map else maps
        if hasattr(model, "layer4"):
            x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
            return model.layer4(model.layer3(model.layer2(model.layer1(x))))
        if hasattr(model, "encoder"):
            height, width = x.shape[-2] // model.patch_size, x.shape[-1] // model.patch_size
            tokens = model._process_input(x)
            tokens = model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), tokens], 1))
            return tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width))
        raise NotImplementedError(
            f"dense: torchvision's {type(model).__name__} gives no map; take the timm network instead"
        )


class OpenClipBackbone(Backbone):
    """The image tower of an open_clip network.

    Args:
        model: the ``visual`` part.
        num_features: width of its output.
        normalize: divide features by their length.
    """

    def __init__(self, model: Any, num_features: int, normalize: bool = False) -> None:
        super().__init__(model)
        self.num_features = num_features
        self.normalize = normalize
        if hasattr(model, "output_tokens"):
            model.output_tokens = True
        self.num_dense_features = getattr(getattr(model, "ln_post", None), "normalized_shape", (num_features,))[0]

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to features (B, D) and tokens (B, N, D')."""
        result = self.model(x)
        if not isinstance(result, tuple):
            raise NotImplementedError(f"tokens: open_clip's {type(self.model).__name__} gives features only")
        return result

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, D)."""
        result = self.model(x)
        features = result[0] if isinstance(result, tuple) else result
        return F.normalize(features, dim=-1) if self.normalize else features

    def tokens(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the vectors of their patches (B, N, D)."""
        return self.run(x)[1]

    def dense(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to a map (B, D, h, w)."""
        tokens = self.tokens(x)
        model: Any = self.model
        return tokens.transpose(1, 2).unflatten(2, tuple(model.grid_size))


class TransformersBackbone(Backbone):
    """A transformers text encoder; inputs are dicts of ``input_ids`` (B, N) and ``attention_mask`` (B, N).

    Args:
        model: of ``AutoModel``.
        pooling: "mean" over the tokens that the mask keeps, or "cls", the first token.

    Raises:
        ValueError: for another pooling.
    """

    in_channels = None

    def __init__(self, model: Any, pooling: str = "mean") -> None:
        super().__init__(model)
        if pooling not in ("mean", "cls"):
            raise ValueError(
                f"backbone: pooling={pooling!r}, must be 'mean' or 'cls'.{suggest(pooling, ['mean', 'cls'])}"
            )
        self.pooling = pooling
        self.num_features = self.num_dense_features = model.config.hidden_size

    def features(self, x: dict[str, Tensor]) -> Tensor:
        """Token ids to features (B, D)."""
        tokens = self.tokens(x)
        if self.pooling == "cls":
            return tokens[:, 0]
        mask = x.get("attention_mask")
        if mask is None:
            return tokens.mean(1)
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)

    def tokens(self, x: dict[str, Tensor]) -> Tensor:
        """Token ids to the last hidden state (B, N, D), padding included."""
        allowed = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")
        return self.model(**{key: x[key] for key in allowed if key in x}).last_hidden_state

    def dense(self, x: Any) -> Tensor:
        """Text has no map."""
        raise NotImplementedError("dense: text has no map of positions; take tokens()")


def create_backbone(
    name: str,
    weights: str | None = None,
    in_channels: int = 3,
    image_size: int | None = None,
    arguments: dict[str, Any] | None = None,
) -> Backbone:
    """Build a feature extractor.

    Args:
        name: a timm name (ours are among them: wrn_28_2, lenet, …), "torchvision:NAME", "open_clip:MODEL[/PRETRAINED]" or
            "hf:NAME_OR_FOLDER".
        weights: ``None`` (random), "pretrained" (the library's own), a file or folder, "hf-hub:owner/name[@revision]", or
            "efficientnet-lite0".
        in_channels: channels of the image, ≥ 1.
        image_size: height and width, for networks built for one size (vision transformers).
        arguments: more for the library's constructor; "hf:" takes ``pooling``, "open_clip:" takes ``normalize``.

    Raises:
        ValueError: for a name that no library knows, with the nearest one.
        WeightsError: when weights cannot be fetched, read or fitted.
    """
    library, _, rest = name.partition(":")
    makers = {"torchvision": torchvision_backbone, "open_clip": open_clip_backbone, "hf": transformers_backbone}
    own = weights == "pretrained"
    maker = makers.get(library, timm_backbone)
    backbone = maker(rest if library in makers else name, own, in_channels, image_size, dict(arguments or {}))
    if weights is not None and not own:
        state = backbone_state(backbone, choose_part(find_weights(weights)))
        load_into(
            backbone, {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}, weights
        )
    return backbone


def backbone_state(backbone: Backbone, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a :class:`Network` for a state dict that has them already, or that has the library's own names.

    A library's classifier becomes ``head.weight`` and ``head.bias``.
    """
    if any(name.startswith("backbone.") for name in state):
        return state
    renamed = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        renamed[f"head.{leaf}" if module in backbone.classifier_names else f"backbone.model.{name}"] = value
    return renamed


def timm_backbone(name: str, own: bool, in_channels: int, size: int | None, arguments: dict[str, Any]) -> Backbone:
    """Build a timm network."""
    import timm

    import zoo.core.small  # noqa: F401 - registers our names

    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        known = timm.list_models()
        raise ValueError(f"backbone: {name!r} is no known network.{suggest(name, known)}")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name.split(".")[0]) else None
    if size is not None and config is not None and config.fixed_input_size:
        arguments = {"img_size": size, **arguments}
    try:
        model = timm.create_model(name, pretrained=own, in_chans=in_channels, num_classes=0, **arguments)
    except Exception as error:
        if not own or isinstance(error, TypeError):
            raise
        raise WeightsError(unreachable(f"timm's {name}", error)) from error
    return TimmBackbone(model, in_channels)


def torchvision_backbone(
    name: str, own: bool, in_channels: int, size: int | None, arguments: dict[str, Any]
) -> Backbone:
    """Build a torchvision network; its first convolution is replaced if the image has not three channels."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"backbone: 'torchvision:{name}' is no known network.{suggest(name, known)}")
    if size is not None and "image_size" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments = {"image_size": size, **arguments}
    try:
        model = models.get_model(name, weights="DEFAULT" if own else None, **arguments)
    except OSError as error:
        raise WeightsError(unreachable(f"torchvision's {name}", error)) from error
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    path, last = layers[-1]
    model.set_submodule(path, nn.Identity())
    if in_channels != 3:
        path, first = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
        if own:
            raise WeightsError(
                f"weights: torchvision's {name} is pretrained on 3 channels, not in_channels={in_channels}"
            )
        settings = ("out_channels", "kernel_size", "stride", "padding")
        values = {key: getattr(first, key) for key in settings}
        model.set_submodule(path, nn.Conv2d(in_channels, bias=first.bias is not None, **values))
    return TorchvisionBackbone(model, last.in_features, in_channels, (path,))


def open_clip_backbone(name: str, own: bool, in_channels: int, size: int | None, arguments: dict[str, Any]) -> Backbone:
    """Build the image tower of an open_clip network."""
    import open_clip

    if in_channels != 3:
        raise ValueError(f"backbone: open_clip:{name} takes 3 channels, not in_channels={in_channels}")
    model_name, _, tag = name.partition("/")
    known = open_clip.list_models()
    if model_name not in known:
        raise ValueError(f"backbone: 'open_clip:{model_name}' is no known network.{suggest(model_name, known)}")
    normalize = arguments.pop("normalize", False)
    if size is not None:
        arguments = {"force_image_size": size, **arguments}
    if own and not tag:
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if not tags:
            raise WeightsError(f"weights: open_clip has none for {model_name}")
        tag = tags[0]
    try:
        model = open_clip.create_model(model_name, pretrained=tag if own or tag else None, **arguments)
    except Exception as error:
        if not tag:
            raise
        raise WeightsError(unreachable(f"open_clip's {name}", error)) from error
    width = open_clip.get_model_config(model_name)["embed_dim"]
    return OpenClipBackbone(model.visual, width, normalize)


def transformers_backbone(
    name: str, own: bool, in_channels: int, size: int | None, arguments: dict[str, Any]
) -> Backbone:
    """Build a transformers encoder; ``weights="pretrained"`` reads those of the same name or folder."""
    from transformers import AutoConfig, AutoModel

    pooling = arguments.pop("pooling", "mean")
    try:
        if own:
            model = AutoModel.from_pretrained(name, trust_remote_code=False, **arguments)
        else:
            model = AutoModel.from_config(AutoConfig.from_pretrained(name, trust_remote_code=False, **arguments))
    except (OSError, ValueError) as error:
        raise WeightsError(unreachable(f"hf:{name}", error)) from error
    return TransformersBackbone(model, pooling)
