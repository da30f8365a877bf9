"""What stands between a backbone and a head."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import normalize

from zoo.core.errors import UserError, check_choice


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
        dropout: rate p after it, in [0, 1).
        dropout_keeps: what dropout leaves as it is in the mean: the ``"values"``, by dividing by 1 - p, or the squared
            ``"length"`` of the features, by dividing by the root of 1 - p, for methods that look at lengths (AFN).

    Raises:
        UserError: for an argument out of its range.
    """

    def __init__(
        self,
        in_features: int,
        width: int = 256,
        norm: bool = True,
        relu: bool = True,
        dropout: float = 0.0,
        dropout_keeps: Literal["values", "length"] = "values",
    ) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"Bottleneck: width={width} must be at least 1")
        if not 0 <= dropout < 1:
            raise UserError(f"Bottleneck: dropout={dropout} must lie in [0, 1)")
        check_choice("Bottleneck", "dropout_keeps", dropout_keeps, ("values", "length"))
        self.num_features = width
        self.scale = (1 - dropout) ** 0.5 if dropout_keeps == "length" else 1.0  # of features with dropout
        self.linear = nn.Linear(in_features, width, bias=not norm)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.activation = nn.ReLU() if relu else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to features (B, E)."""
        features = self.dropout(self.activation(self.norm(self.linear(features))))
        return features * self.scale if self.training and self.scale != 1.0 else features


class UnitLength(Neck):
    r"""Features of length one, so that a linear head sees their direction alone: :math:`n(\phi) = \phi / \|\phi\|_2`.

    A probe on them fits weak labels less closely, and so repeats fewer of the supervisor's errors. They are small, so
    that the head needs a larger learning rate than it does on raw features.

    Args:
        in_features: D.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.num_features = in_features

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to features (B, D) of length one; zeros stay zeros."""
        return normalize(features, dim=1)
