"""Several frozen networks, and one set of features made of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.core.teachers import Frozen


class Experts(nn.ModuleList):
    """Frozen networks, each of which knows some of the domains.

    Args:
        networks: N of them, with as many features.
        owners: of every domain, the number of the expert that knows it.
        width: how many features they must have.

    Raises:
        UserError: for a network with another number of features.
    """

    others: Tensor
    own: Tensor

    def __init__(self, networks: Iterable[Network], owners: Sequence[int], width: int) -> None:
        networks = list(networks)
        for number, expert in enumerate(networks):
            if expert.num_features != width:
                raise UserError(
                    f"Experts: expert {number} has {expert.num_features} features, the student {width}; they must have "
                    "as many"
                )
        super().__init__(Frozen(network) for network in networks)
        others = torch.tensor([[number for number in range(len(networks)) if number != owner] for owner in owners])
        self.register_buffer("others", others, persistent=False)
        self.register_buffer("own", one_hot(torch.tensor(owners), len(networks)).bool(), persistent=False)

    @torch.no_grad()
    def forward(self, x: Any) -> Tensor:
        """Features of all experts (B, N, D)."""
        experts: Any = self
        return torch.stack([expert.module.features(x) for expert in experts], dim=1)

    def masked(self, tokens: Tensor, mask: Literal["drop", "zero"]) -> Tensor:
        """Features (S, B, N, D) of samples of every domain, without those of the expert that knows the domain.

        Args:
            tokens: of S domains.
            mask: ``"drop"`` leaves them out, (S, B, N - 1, D); ``"zero"`` makes them 0.
        """
        if mask == "drop":
            return torch.take_along_dim(tokens, self.others[:, None, :, None], dim=2)
        return tokens.masked_fill(self.own[:, None, :, None], 0.0)


class Aggregator(nn.Module):
    """Features of N experts (B, N, D) to features (B, D), whatever the experts' order.

    A pre-norm transformer with GELU and a hidden layer of 2 D, and the mean over the experts. (The authors have no
    dropout between attention and residual.)

    Args:
        width: D.
        depth: layers, at least 1.
        heads: attention heads, which divide D.
        dropout: rate, in [0, 1).

    Raises:
        UserError: if an argument is out of its range.

    Source: Zhong et al. 2022, arXiv 2210.03885, section 4.1.
    """

    def __init__(self, width: int, depth: int = 1, heads: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        if depth < 1 or not 0.0 <= dropout < 1.0:
            raise UserError(f"Aggregator: depth={depth} must be at least 1 and dropout={dropout} lie in [0, 1)")
        if heads < 1 or width % heads:
            possible = [number for number in range(1, width + 1) if width % number == 0 and number <= 16]
            raise UserError(f"Aggregator: heads={heads} must divide the {width} features, as {possible} do")
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, D)."""
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens.mean(dim=1)
