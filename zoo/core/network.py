"""A network is a backbone and a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.backbones import Backbone, backbone_state, create_backbone
from zoo.core.heads import Head, Linear
from zoo.core.weights import WeightsError, choose_part, find_weights, load_into

__all__ = ["Network"]


class Network(nn.Module):
    r"""Backbone :math:`\phi` and head :math:`h`: logits :math:`z = h(\phi(x))`.

    As a recipe it lacks only the number of outputs: ``partial(Network, backbone="lenet", in_channels=1)`` in Python,
    ``network: {class_path: Network, init_args: {backbone: lenet, in_channels: 1}}`` in YAML.

    Args:
        num_outputs: C, ≥ 1.
        backbone: a timm name (ours among them: ``wrn_28_2``, ``lenet``, ``resnet20_cifar``, …), ``torchvision:NAME``,
            ``open_clip:MODEL[/PRETRAINED]`` or ``hf:NAME_OR_FOLDER``.
        weights: ``None`` for random ones, ``pretrained`` for the library's own, a file (.safetensors, .pt, .ckpt of a
            training) or a folder, ``hf-hub:owner/name[@revision]``, or ``efficientnet-lite0``.
        head: recipe of the head, from D and C; default: linear.
        in_channels: channels of the image.
        dropout: rate in front of the head, in [0, 1).
        image_size: height and width, needed by networks that are built for one size.
        channels_last: store images and weights channels last, faster for convolutions on GPUs.
        arguments: more for the library's constructor.

    Raises:
        ValueError: for a name or number that is not possible.
        WeightsError: when weights cannot be fetched, read or fitted.
    """

    def __init__(
        self,
        num_outputs: int,
        backbone: str = "wrn_28_2",
        weights: str | None = None,
        head: Callable[[int, int], Head] = Linear,
        in_channels: int = 3,
        dropout: float = 0.0,
        image_size: int | None = None,
        channels_last: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_outputs", num_outputs), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"Network: {name}={value}, must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"Network: dropout={dropout}, must lie in [0, 1)")
        own = weights if weights == "pretrained" else None
        self.backbone: Backbone = create_backbone(backbone, own, in_channels, image_size, arguments)
        self.num_features = self.backbone.num_features
        self.num_outputs = num_outputs
        self.dropout = nn.Dropout(dropout)
        self.head: nn.Module = head(self.num_features, num_outputs)
        self.channels_last = channels_last
        if weights is not None and own is None:
            self.load(weights)
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def load(self, weights: str) -> None:
        """Put the weights of a file, folder or hub repository into backbone and head.

        Weights without a head (or of a bare library network whose classifier has another number of classes, as when an
        ImageNet network starts a new task) fill the backbone alone.

        Raises:
            WeightsError: when they do not fit.
        """
        given = choose_part(find_weights(weights))
        ours = any(name.startswith("backbone.") for name in given)
        state = backbone_state(self.backbone, given)
        head = {name: value.shape for name, value in state.items() if name.startswith("head.")}
        own = {f"head.{name}": value.shape for name, value in self.head.state_dict().items()}
        fits = head == own
        if ours and head and not fits and head.keys() == own.keys():
            there, here = ({shape[0] for shape in shapes.values() if shape} for shapes in (head, own))
            raise WeightsError(f"weights: {weights} has a head of {max(there)} outputs, but num_outputs={max(here)}")
        load_into(self, state, f"weights {weights}", drop_head=not fits)

    def prepare(self, x: Any) -> Any:
        """Check an input's channels and bring it to the memory format; text passes through.

        Raises:
            ValueError: when an image has not ``in_channels`` channels.
        """
        expected = self.backbone.in_channels
        if expected is None or not isinstance(x, Tensor):
            return x
        if x.dim() != 4 or x.shape[1] != expected:
            raise ValueError(
                f"Network: an input of shape {tuple(x.shape)}, but in_channels={expected}: (B, {expected}, H, W)"
            )
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def features(self, x: Any) -> Tensor:
        """Inputs to features (B, D)."""
        return self.backbone.features(self.prepare(x))

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        return self.head(self.dropout(features))

    def tokens(self, x: Any) -> Tensor:
        """Inputs to the vectors of their positions (B, N, D)."""
        return self.backbone.tokens(self.prepare(x))

    def dense(self, x: Any) -> Tensor:
        """Images to a map (B, D, h, w)."""
        return self.backbone.dense(self.prepare(x))

    def feature_maps(self, x: Any) -> list[Tensor]:
        """Images to the maps of successive stages [(B, D_i, h_i, w_i)]."""
        return self.backbone.feature_maps(self.prepare(x))

    def forward(self, x: Any) -> Tensor:
        """Inputs to logits (B, C)."""
        return self.logits(self.features(x))
