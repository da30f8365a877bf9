"""Networks that tell domains apart."""

from torch import Tensor, nn


class DomainDiscriminator(nn.Module):
    """Features (B, D) to domain logits (B,), by a multi-layer perceptron.

    The defaults are TLlib's for ImageNet backbones; the paper's networks for digits have one hidden layer of 100 units
    (MNIST) or two of 1,024 (SVHN), without BatchNorm.

    Args:
        in_features: D.
        hidden: width of the hidden layers.
        layers: their number, ≥ 1.
        norm: BatchNorm after each. The two domains must then come in one batch, as :class:`DANN` feeds them.
    """

    def __init__(self, in_features: int, hidden: int = 1024, layers: int = 2, norm: bool = True) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"DomainDiscriminator: layers={layers}, must be at least 1")
        modules: list[nn.Module] = []
        for width in [in_features] + [hidden] * (layers - 1):
            modules += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden) if norm else nn.Identity(), nn.ReLU()]
        self.layers = nn.Sequential(*modules, nn.Linear(hidden, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Domain logits; positive means source."""
        return self.layers(features).squeeze(1)
