"""Networks that tell domains apart, and what of a sample they see."""

import torch
from torch import Tensor, nn

from zoo.core.errors import UserError


class DomainDiscriminator(nn.Module):
    """Features (B, D) to domain logits (B,), by a multi-layer perceptron.

    The defaults are TLlib's for ImageNet backbones; the networks of the DANN paper for digits have one hidden layer of
    100 units (MNIST) or two of 1,024 (SVHN), without BatchNorm.

    Args:
        in_features: D.
        hidden: width of the hidden layers, at least 1.
        layers: their number, at least 1.
        norm: BatchNorm after each. The two domains must then come in one batch, as all methods here feed them.

    Raises:
        UserError: for an argument out of its range.
    """

    def __init__(self, in_features: int, hidden: int = 1024, layers: int = 2, norm: bool = True) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise UserError(f"DomainDiscriminator: {name}={value} must be at least 1")
        modules: list[nn.Module] = []
        for width in [in_features] + [hidden] * (layers - 1):
            modules += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden) if norm else nn.Identity(), nn.ReLU()]
        self.layers = nn.Sequential(*modules, nn.Linear(hidden, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Domain logits; positive means source."""
        return self.layers(features).squeeze(1)


class ClassDiscriminators(nn.Module):
    """Features (B, D) to a domain logit for every class (B, C): C perceptrons side by side, computed at once.

    Args:
        in_features: D.
        num_classes: C.
        hidden: width of the hidden layers of each, at least 1.
        layers: their number, at least 1.
        norm: BatchNorm after each.

    Raises:
        UserError: for an argument out of its range.
    """

    def __init__(
        self, in_features: int, num_classes: int, hidden: int = 1024, layers: int = 2, norm: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise UserError(f"ClassDiscriminators: {name}={value} must be at least 1")
        self.num_classes = num_classes
        modules: list[nn.Module] = []
        for depth, width in enumerate([in_features] + [hidden] * (layers - 1)):
            linear = nn.Linear(width, num_classes * hidden) if depth == 0 else Parallel(num_classes, width, hidden)
            norm_layer = nn.BatchNorm1d(num_classes * hidden) if norm else nn.Identity()
            modules += [linear, norm_layer, nn.ReLU()]
        self.layers = nn.Sequential(*modules, Parallel(num_classes, hidden, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Domain logits (B, C); positive means source."""
        return self.layers(features)


class Parallel(nn.Module):
    """Linear maps side by side: group k of the input (B, G·D) to group k of the output (B, G·E).

    Args:
        groups: G.
        in_features: D of each.
        out_features: E of each.
    """

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = in_features**-0.5  # that of nn.Linear
        self.weight = nn.Parameter(torch.empty(groups, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """All maps in one batched product."""
        groups = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)
        return torch.baddbmm(self.bias.to(x.dtype), groups, self.weight.to(x.dtype)).transpose(0, 1).flatten(1)


class FeaturesAlone(nn.Module):
    """The features (B, D), whatever the prediction: the view of DANN.

    Args:
        in_features: D.
        num_classes: not looked at.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = in_features

    def forward(self, features: Tensor, probabilities: Tensor) -> Tensor:
        """The features."""
        return features


class MultilinearMap(nn.Module):
    r"""Features f and prediction g joined, so that a discriminator sees the domain of each class apart.

    .. math:: T(f, g) = f \otimes g \quad \text{if } D C \le \text{limit, else} \quad
        \tfrac{1}{\sqrt d} (R_f f) \odot (R_g g)

    The entries of :math:`R_f, R_g` are drawn once from a standard normal distribution. They are buffers, so that a
    checkpoint has them; in TLlib they are not, and a resumed run goes on with others.

    Args:
        in_features: D.
        num_classes: C.
        limit: the largest product that is spread out.
        random_features: d, for larger ones.

    Raises:
        UserError: for d < 1.

    Source: Long et al. 2018, arXiv 1705.10667, section 3, with the limit of 4096 and d = 1024.
    """

    of_features: Tensor
    of_classes: Tensor

    def __init__(self, in_features: int, num_classes: int, limit: int = 4096, random_features: int = 1024) -> None:
        super().__init__()
        if random_features < 1:
            raise UserError(f"MultilinearMap: random_features={random_features} must be at least 1")
        self.random = in_features * num_classes > limit
        self.num_features = random_features if self.random else in_features * num_classes
        if self.random:
            self.register_buffer("of_features", torch.randn(in_features, random_features))
            self.register_buffer("of_classes", torch.randn(num_classes, random_features))

    def forward(self, features: Tensor, probabilities: Tensor) -> Tensor:
        """(B, D) and (B, C) to (B, C·D), or to (B, d)."""
        if self.random:
            joined = (features @ self.of_features.to(features.dtype)) * (
                probabilities @ self.of_classes.to(probabilities.dtype)
            )
            return joined / self.num_features**0.5
        return (probabilities.unsqueeze(2) * features.unsqueeze(1)).flatten(1)
