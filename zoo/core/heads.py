"""Heads: from features (B, D) to logits (B, C).

Every head takes ``(in_features, num_outputs)`` first: a head class is itself a recipe ``Callable[[int, int], Head]``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import UserError

__all__ = ["MLP", "Cosine", "EquiangularBasis", "Head", "Linear", "NaiveBayes", "Prototypes", "WeightNorm"]


class Head(nn.Module):
    """Base of every head: features (B, D) to logits (B, C). It exists so that configurations can use short names."""


class Linear(nn.Linear, Head):
    r"""Affine map, the ordinary classifier.

    .. math:: z = W f + b

    Args:
        in_features: D.
        num_outputs: C.
        bias: whether to add :math:`b`.
    """

    def __init__(self, in_features: int, num_outputs: int, bias: bool = True) -> None:
        super().__init__(in_features, num_outputs, bias=bias)


class Cosine(Head):
    r"""Scaled cosine between the features and one direction per class.

    .. math:: z_c = s \, \frac{w_c^\top f}{\lVert w_c \rVert \lVert f \rVert}

    Args:
        in_features: D.
        num_outputs: C.
        scale: s > 0; the logits lie in [-s, s].

    Source: Gidaris and Komodakis 2018, arXiv 1804.09458, section 3.2 (their scale is learned; this one is fixed).
    """

    def __init__(self, in_features: int, num_outputs: int, scale: float = 16.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"Cosine: scale={scale}, must be greater than 0")
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_outputs, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw directions uniformly on the sphere."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))


class WeightNorm(Head):
    r"""Affine map whose rows have a direction and a length of their own.

    .. math:: z_c = g_c \frac{v_c^\top f}{\lVert v_c \rVert} + b_c

    Args:
        in_features: D.
        num_outputs: C.

    Source: Salimans and Kingma 2016, arXiv 1602.07868, equation 2; the head of SHOT, arXiv 2002.08546.
    """

    def __init__(self, in_features: int, num_outputs: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(num_outputs, in_features))
        self.length = nn.Parameter(torch.empty(num_outputs))
        self.bias = nn.Parameter(torch.empty(num_outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw directions by Xavier's normal, as SHOT's code does, with the lengths that they have; no bias."""
        nn.init.xavier_normal_(self.direction)
        with torch.no_grad():
            self.length.copy_(self.direction.norm(dim=1))
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        return F.linear(features, F.normalize(self.direction, dim=1) * self.length[:, None], self.bias)


class MLP(Head):
    r"""One hidden layer.

    .. math:: z = W_2 \max(0, W_1 f + b_1) + b_2

    Args:
        in_features: D.
        num_outputs: C.
        hidden: width of the hidden layer; ``None`` is D.
    """

    def __init__(self, in_features: int, num_outputs: int, hidden: int | None = None) -> None:
        super().__init__()
        width = in_features if hidden is None else hidden
        if width < 1:
            raise ValueError(f"MLP: hidden={hidden}, must be at least 1")
        self.hidden = nn.Linear(in_features, width)
        self.output = nn.Linear(width, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        return self.output(F.relu(self.hidden(features)))


def simplex(num_vectors: int, dimension: int, seed: int = 0) -> Tensor:
    r"""Unit vectors (C, D) whose pairwise cosines are all :math:`-1/(C-1)`, in a random orientation.

    The rows of an orthonormal basis U (C, C-1) of the centred subspace of R^C, lengthened to 1 and turned into R^D by a
    matrix Q (D, C-1) with orthonormal columns:

    .. math:: W = \sqrt{\tfrac{C}{C-1}} \, U Q^\top, \qquad W W^\top = \tfrac{C}{C-1} (I - \tfrac1C 1 1^\top)

    Args:
        num_vectors: 2 ≤ C ≤ D + 1.
        dimension: D.
        seed: of the orientation.

    Raises:
        UserError: when so many vectors do not fit.
    """
    if not 2 <= num_vectors <= dimension + 1:
        raise UserError(f"simplex: num_vectors={num_vectors}, must lie in [2, dimension + 1 = {dimension + 1}]")
    generator = torch.Generator().manual_seed(seed)
    size = num_vectors
    centring = torch.eye(size, dtype=torch.float64, device="cpu") - 1 / size
    basis = torch.linalg.eigh(centring).eigenvectors[:, 1:]  # eigenvalue 0 (the constant vector) comes first
    turn = torch.randn(dimension, size - 1, dtype=torch.float64, device="cpu", generator=generator)
    return (math.sqrt(size / (size - 1)) * basis @ torch.linalg.qr(turn).Q.T).float()


def orthonormal(num_vectors: int, dimension: int, seed: int = 0) -> Tensor:
    """Orthogonal unit vectors (C, D), drawn uniformly.

    Args:
        num_vectors: C ≤ D.
        dimension: D.
        seed: of the draw.

    Raises:
        UserError: when so many vectors do not fit.
    """
    if num_vectors > dimension:
        raise UserError(f"orthonormal: num_vectors={num_vectors}, must be at most dimension = {dimension}")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(dimension, num_vectors, dtype=torch.float64, device="cpu", generator=generator)
    return torch.linalg.qr(start).Q.T.float().contiguous()


def hadamard(num_vectors: int, dimension: int) -> Tensor:
    """Orthogonal unit vectors (C, D) whose entries have one size, of Sylvester's matrix.

    Its order P is the largest power of two that is at most D; the last D - P coordinates are 0.

    Args:
        num_vectors: C ≤ P.
        dimension: D ≥ 1.

    Raises:
        UserError: when so many vectors do not fit.
    """
    order = 1 << (dimension.bit_length() - 1)
    if num_vectors > order:
        raise UserError(f"hadamard: num_vectors={num_vectors}, must be at most {order} in {dimension} dimensions")
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return F.pad(matrix[:num_vectors] / math.sqrt(order), (0, dimension - order))


def welch_bound(num_vectors: int, dimension: int) -> float:
    r"""The smallest largest \|cosine\| that is possible: :math:`\sqrt{(C - D) / (D (C - 1))}`, and 0 for C ≤ D."""
    excess = max(num_vectors - dimension, 0)
    return math.sqrt(excess / (dimension * (num_vectors - 1))) if excess else 0.0


def spread(num_vectors: int, dimension: int, seed: int = 0, steps: int = 300) -> Tensor:
    r"""Unit vectors (C, D) whose largest \|cosine\| is small, for C > D.

    Descent on a soft maximum of the squared cosines,

    .. math:: \tfrac1\beta \log \sum_{i \ne j} e^{\beta \cos_{ij}^2}, \qquad \beta \propto 1 / \mathrm{Welch}^2,

    from a random tight frame, with β growing. The paper descends on :math:`\sum \max(0, |\cos_{ij}| - \alpha)` for up
    to 100,000 steps: 1,000 vectors in 100 dimensions reach 0.135 there and 0.139 here; the bound is 0.095.

    Args:
        num_vectors: C.
        dimension: D.
        seed: of the starting point; the result is a function of (C, D, seed, steps).
        steps: of descent.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(num_vectors, dimension, device="cpu", generator=generator)
    vectors = nn.Parameter(F.normalize(torch.linalg.qr(start).Q, dim=1))
    optimizer = torch.optim.Adam([vectors])
    squared_bound = welch_bound(num_vectors, dimension) ** 2
    with torch.enable_grad():
        for step in range(steps):
            done = step / steps
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - done) + 1e-4
            beta = 40**done / squared_bound
            unit = F.normalize(vectors, dim=1)
            squares = (unit @ unit.T).square().fill_diagonal_(0)
            optimizer.zero_grad()
            (100 * torch.logsumexp(beta * squares.flatten(), 0) / beta).backward()
            optimizer.step()
    return F.normalize(vectors.detach(), dim=1)


def equiangular(num_vectors: int, dimension: int, seed: int = 0) -> Tensor:
    r"""Unit vectors (C, D), as orthogonal as they can be.

    .. math:: \min_W \max_{i \ne j} |w_i^\top w_j|

    Exact for C ≤ D, where all are orthogonal, and for C = D + 1, where they are the vertices of a simplex; otherwise
    from :func:`spread`.
    """
    if num_vectors <= dimension:
        return orthonormal(num_vectors, dimension, seed)
    return (simplex if num_vectors == dimension + 1 else spread)(num_vectors, dimension, seed)


class EquiangularBasis(Head):
    r"""Cosine to fixed class directions; nothing is learned in the head.

    .. math:: z_c = \frac{1}{\tau} \frac{w_c^\top f}{\lVert f \rVert}, \qquad \lVert w_c \rVert = 1

    The directions are buffers, so that they are in every checkpoint. Kinds:

    - ``"ebv"``, equiangular basis vectors: :math:`|w_i^\top w_j|` as small as possible, 0 for C ≤ D. Only lines count,
      so any two classes are alike to each other.
    - ``"etf"``, the simplex: :math:`w_i^\top w_j = -1/(C-1)`, as far apart as directions can be; C ≤ D + 1.
    - ``"hadamard"``: orthogonal, with entries of one size; C at most the largest power of two in D.
    - ``"random"``: drawn uniformly.

    Args:
        in_features: D.
        num_outputs: C ≥ 2.
        temperature: τ > 0, 0.07 in the paper.
        kind: of directions.
        seed: of the directions.

    Raises:
        UserError: if an argument is out of its range, or so many directions of this kind do not fit.

    Source: Shen, Sun and Wei 2023, arXiv 2303.11637, equations 2-4; the simplex: Papyan et al. 2020, arXiv 2008.08186.
    """

    vectors: Tensor

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        temperature: float = 0.07,
        kind: Literal["ebv", "etf", "hadamard", "random"] = "ebv",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"EquiangularBasis: temperature={temperature}, must be greater than 0")
        if num_outputs < 2:
            raise UserError(f"EquiangularBasis: num_outputs={num_outputs}, must be at least 2")
        if kind not in (kinds := ("ebv", "etf", "hadamard", "random")):
            raise UserError(f"EquiangularBasis: kind={kind!r}, must be one of {', '.join(kinds)}")
        self.temperature, self.kind, self.seed = temperature, kind, seed
        self.register_buffer("vectors", torch.empty(num_outputs, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the directions; also what a module built on the meta device calls."""
        if self.vectors.is_meta:
            return
        count, dimension = self.vectors.shape
        if self.kind == "ebv":
            vectors = equiangular(count, dimension, self.seed)
        elif self.kind == "etf":
            vectors = simplex(count, dimension, self.seed)
        elif self.kind == "hadamard":
            vectors = hadamard(count, dimension)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            vectors = F.normalize(torch.randn(count, dimension, device="cpu", generator=generator), dim=1)
        self.vectors.copy_(vectors)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        return F.linear(F.normalize(features, dim=-1), self.vectors) / self.temperature


class NaiveBayes(Head):
    r"""Gaussian naive Bayes, one variance per feature for all classes: its posterior is linear in the features.

    .. math:: z_c = \log \pi_c + \sum_d \Big( \frac{\mu_{cd}}{\sigma_d^2} f_d - \frac{\mu_{cd}^2}{2 \sigma_d^2} \Big)

    so that softmax(z) is :math:`p(c \mid f)` exactly: the terms left out are the same for every class. :meth:`fit` sets
    means, variances and priors in closed form. They are buffers; before the first fit the posterior is uniform.

    Args:
        in_features: D.
        num_outputs: C.
        smoothing: share of the largest variance that is added to all, ≥ 0, as in scikit-learn's ``var_smoothing``.

    Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, sections 4.3 and 6.6.3.
    """

    mean: Tensor
    variance: Tensor
    log_prior: Tensor

    def __init__(self, in_features: int, num_outputs: int, smoothing: float = 1e-6) -> None:
        super().__init__()
        if smoothing < 0:
            raise ValueError(f"NaiveBayes: smoothing={smoothing}, must not be negative")
        self.smoothing = smoothing
        self.register_buffer("mean", torch.zeros(num_outputs, in_features))
        self.register_buffer("variance", torch.ones(in_features))
        self.register_buffer("log_prior", torch.full((num_outputs,), -math.log(num_outputs)))

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Maximum likelihood from features (N, D) and labels (N,) in [0, C).

        Raises:
            ValueError: when a class has no sample.
        """
        self.mean.copy_(class_means(features, labels, len(self.mean)))
        residual = (features - self.mean[labels]).square().mean(0)
        self.variance.copy_(residual + self.smoothing * features.var(0, unbiased=False).max() + 1e-12)
        self.log_prior.copy_((torch.bincount(labels, minlength=len(self.mean)) / len(labels)).log())

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        weight = self.mean / self.variance
        return F.linear(features, weight, self.log_prior - 0.5 * (weight * self.mean).sum(1))


class Prototypes(Head):
    r"""Nearest class mean by squared Euclidean distance.

    .. math:: z_c = -s \lVert f - \mu_c \rVert^2

    The prototypes are parameters: train them, or set them to the class means with :meth:`fit`.

    Args:
        in_features: D.
        num_outputs: C.
        scale: s > 0.

    Source: Snell, Swersky and Zemel 2017, arXiv 1703.05175, equations 1-2.
    """

    def __init__(self, in_features: int, num_outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"Prototypes: scale={scale}, must be greater than 0")
        self.scale = scale
        self.prototypes = nn.Parameter(torch.empty(num_outputs, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw prototypes of length about 1."""
        nn.init.normal_(self.prototypes, std=1 / math.sqrt(self.prototypes.shape[1]))

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Class means of features (N, D) with labels (N,) in [0, C).

        Raises:
            ValueError: when a class has no sample.
        """
        self.prototypes.copy_(class_means(features, labels, len(self.prototypes)))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        products = F.linear(features, self.prototypes)
        squares = features.square().sum(-1, keepdim=True) + self.prototypes.square().sum(-1)
        return self.scale * (2 * products - squares)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean of the features (N, D) of each class: (C, D).

    Raises:
        ValueError: when a class has no sample, naming it.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    if len(counts) > num_classes or bool((counts == 0).any()):
        empty = (counts == 0).nonzero().flatten().tolist()
        problem = (
            f"classes {empty} have no sample" if empty else f"label {int(labels.max())} ≥ num_outputs={num_classes}"
        )
        raise ValueError(f"fit: {problem}")
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts.unsqueeze(1)
