"""What stands between a backbone and a head."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.core.errors import UserError


class Neck(nn.Module):
    """Backbone features (B, D) to features (B, E); ``num_features`` says E."""

    num_features: int


class Bottleneck(Neck):
    """A small layer whose output is aligned between domains: linear, BatchNorm, ReLU, dropout.

    The defaults are TLlib's 256 units. SHOT's has no ReLU and no dropout.

    Args:
        in_features: D.
        width: E, at least 1.
        norm: BatchNorm after the linear layer.
        relu: ReLU at the end.
        dropout: rate after it, in [0, 1).
    """

    def __init__(
        self, in_features: int, width: int = 256, norm: bool = True, relu: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"Bottleneck: width={width} must be at least 1")
        if not 0 <= dropout < 1:
            raise UserError(f"Bottleneck: dropout={dropout} must lie in [0, 1)")
        self.num_features = width
        self.linear = nn.Linear(in_features, width, bias=not norm)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.activation = nn.ReLU() if relu else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to features (B, E)."""
        return self.dropout(self.activation(self.norm(self.linear(features))))
