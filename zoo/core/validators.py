"""How good predictions on unlabelled samples look: what a model can be chosen by without labels of the target.

Everything here is larger where a model is taken to be better. The metrics stream: they keep sums, whatever the number
of samples, and several ranks give what one gives on all samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.core.errors import UserError
from zoo.losses.entropy import entropy

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


class _Prediction(Metric):
    """A metric of logits (B, C) that counts in ``number_type``: 32 bits where a device has no 64."""

    higher_is_better = True
    full_state_update = False
    samples: Tensor

    def __init__(self, number_type: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.number_type = number_type
        self.add_state("samples", torch.zeros((), dtype=number_type), "sum")

    def update(self, logits: Tensor) -> None:
        """Count the samples."""
        self.samples = self.samples + len(logits)


class NegativeEntropy(_Prediction):
    r"""How decided the predictions are: :math:`-\tfrac1N \sum_i H(p_i) \in [-\log C, 0]`.

    A model that puts everything into one class, surely, has the best value there is.

    Args:
        number_type: of the sums.
        **kwargs: see :class:`torchmetrics.Metric`.

    Source: Morerio et al. 2018, arXiv 1711.10288, section 4 (entropy of the target as a criterion).
    """

    total: Tensor

    def __init__(self, number_type: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(number_type, **kwargs)
        self.add_state("total", torch.zeros((), dtype=number_type), "sum")

    def update(self, logits: Tensor) -> None:
        """Add logits (B, C)."""
        super().update(logits)
        self.total = self.total + entropy(logits.to(self.number_type)).sum()

    def compute(self) -> Tensor:
        """The value of all samples."""
        return -self.total / self.samples


class InformationMaximization(_Prediction):
    r"""Decided predictions of all classes: what the prediction says about the sample, in nats.

    .. math:: H\Big(\tfrac1N \sum_i p_i\Big) - \tfrac1N \sum_i H(p_i) \in [0, \log C], \quad p_i = \mathrm{softmax}(z_i)

    It is the mutual information of sample and predicted class: 0 where all predictions are alike, :math:`\log C` where
    they are certain and every class is as frequent as any other. Targets of very uneven classes are misjudged.

    Args:
        num_classes: C.
        number_type: of the sums.
        **kwargs: see :class:`torchmetrics.Metric`.

    Source: Krause et al. 2010, "Discriminative Clustering by Regularized Information Maximization", equation 3; as a
    validator: Musgrave et al. 2022, arXiv 2208.07360.
    """

    total: Tensor
    classes: Tensor

    def __init__(self, num_classes: int, number_type: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(number_type, **kwargs)
        self.add_state("total", torch.zeros((), dtype=number_type), "sum")
        self.add_state("classes", torch.zeros(num_classes, dtype=number_type), "sum")

    def update(self, logits: Tensor) -> None:
        """Add logits (B, C)."""
        super().update(logits)
        logits = logits.to(self.number_type)
        self.total = self.total + entropy(logits).sum()
        self.classes = self.classes + logits.softmax(dim=1).sum(dim=0)

    def compute(self) -> Tensor:
        """The value of all samples."""
        mean = self.classes / self.samples
        return torch.special.entr(mean).sum() - self.total / self.samples


def _joined_factors(factors: Tensor) -> Tensor:
    return torch.linalg.qr(factors.flatten(0, 1), mode="r").R


class BatchNuclearNorm(_Prediction):
    r"""Decided predictions of many classes, by the singular values :math:`\sigma_k` of all predictions as a matrix.

    .. math:: \frac{\lVert P \rVert_*}{\sqrt{N \min(N, C)}} \in (0, 1], \quad \lVert P \rVert_* = \sum_k \sigma_k(P),
        \quad P \in [0, 1]^{N \times C}

    The paper divides by N alone, which orders models alike; here 1 are certain predictions, every class as frequent as
    any other, for any N, and equal uniform ones have :math:`1 / C` where :math:`C \le N`. P is not kept: the factor R
    (C, C) of its QR decomposition has the same singular values and can be continued from batch to batch.

    Args:
        num_classes: C.
        number_type: of the factor.
        **kwargs: see :class:`torchmetrics.Metric`.

    Source: Cui et al. 2020, arXiv 2003.12237, equations 5 and 9.
    """

    factor: Tensor

    def __init__(self, num_classes: int, number_type: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(number_type, **kwargs)
        self.num_classes = num_classes
        self.add_state("factor", torch.zeros(num_classes, num_classes, dtype=number_type), _joined_factors)

    def update(self, logits: Tensor) -> None:
        """Add logits (B, C)."""
        super().update(logits)
        rows = torch.cat([self.factor, logits.to(self.number_type).softmax(dim=1)])
        self.factor = torch.linalg.qr(rows, mode="r").R

    def compute(self) -> Tensor:
        """The value of all samples."""
        smaller = self.samples.clamp(max=self.num_classes)
        return torch.linalg.svdvals(self.factor).sum() / (self.samples * smaller).sqrt()


def soft_neighborhood_density(vectors: Tensor, temperature: float = 0.05, block: int = 1024) -> Tensor:
    r"""Whether samples have many near neighbours: the mean entropy of the similarities of a sample to all others.

    .. math:: \frac1N \sum_i H(q_i) \in [0, \log(N - 1)], \quad
        q_{ij} = \frac{\exp(\cos(x_i, x_j) / \tau)}{\sum_{k \ne i} \exp(\cos(x_i, x_k) / \tau)} \quad (j \ne i)

    It is large where samples lie in dense groups, and largest where all samples are one point: like the entropy it does
    not see a collapse. Values of different N are not comparable. Memory is O(N · block), time is quadratic: O(N² D).

    Args:
        vectors: x (N, D), N ≥ 1, of any length; the paper takes the predicted probabilities.
        temperature: τ > 0.
        block: rows of the similarities that are held at a time, at least 1.

    Returns:
        A scalar of the vectors' type; 0 for one sample alone.

    Source: Saito et al. 2021, arXiv 2108.10860, equations 1-3, with τ = 0.05.
    """
    if len(vectors) < 2:
        return vectors.new_zeros(())
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    own = torch.arange(len(vectors), device=vectors.device)
    total = vectors.new_zeros(())
    for start in range(0, len(vectors), block):
        similarity = vectors[start : start + block] @ vectors.T / temperature
        self_ = own[start : start + block, None] == own
        log_q = similarity.masked_fill(self_, -torch.inf).log_softmax(dim=1)
        total = total - (log_q.exp() * log_q.masked_fill(self_, 0.0)).sum()
    return total / len(vectors)


def domain_classifier() -> Pipeline:
    """Logistic regression on standardised features, by scikit-learn: deterministic, and linear in the features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def density_ratio(source: Tensor, target: Tensor, at: Tensor) -> Tensor:
    r"""How much denser the target is than the source: :math:`w(f) = \frac{N_s}{N_t} \frac{P(t \mid f)}{P(s \mid f)}`.

    Args:
        source: features (N_s, D) of the source; with those of the target a linear domain classifier is fitted to them.
        target: features (N_t, D).
        at: features (M, D) to weight, which the classifier should not have seen.

    Returns:
        w (M,) ≥ 0, float64, on the CPU.

    Source: You et al. 2019, "Towards Accurate Model Selection in Deep Unsupervised Domain Adaptation", section 4.2,
    whose classifier is a small network.
    """
    features = torch.cat([source, target]).double().cpu().numpy()
    is_target = torch.cat([torch.zeros(len(source)), torch.ones(len(target))]).numpy()
    fitted = domain_classifier().fit(features, is_target)
    log_odds = torch.from_numpy(fitted.decision_function(at.double().cpu().numpy()))
    return log_odds.clamp(max=50.0).exp() * (len(source) / len(target))  # finite where the domains are far apart


def deep_embedded_validation(weights: Tensor, losses: Tensor) -> Tensor:
    r"""The risk on the target, estimated from losses on held-out source samples weighted by the density ratio.

    .. math:: \frac1n \sum_i w_i \ell_i + \eta \Big(\frac1n \sum_i w_i - 1\Big), \quad
        \eta = -\frac{\mathrm{Cov}(w \ell, w)}{\mathrm{Var}(w)}

    The second term is a control variate: its expectation is 0, because weights are 1 on average, and it takes away what
    the estimate varies with the weights. Where all losses are equal, they are the estimate, whatever the weights.

    Args:
        weights: w (n,) ≥ 0.
        losses: ℓ (n,).

    Returns:
        A scalar, which may be negative; smaller is better, so that the validator is its negative. Where all weights are
        equal there is nothing to control, and it is the weighted mean.

    Source: You et al. 2019, "Towards Accurate Model Selection in Deep Unsupervised Domain Adaptation", algorithm 1.
    """
    weighted = weights * losses
    centred = weights - weights.mean()
    variance = centred.square().sum()
    eta = torch.where(
        variance > 0, -(centred * weighted).sum() / variance.clamp_min(torch.finfo(weights.dtype).tiny), 0
    )
    return weighted.mean() + eta * (weights.mean() - 1)


def a_distance(source: Tensor, target: Tensor, seed: int = 0) -> float:
    r"""How well a linear classifier tells two domains apart: :math:`2 (1 - 2 \epsilon) \in [0, 2]`.

    :math:`\epsilon` is its error on samples that it was not fitted to: fitted to one half, tested on the other, and the
    reverse. Both domains count alike: the larger one is cut to the size of the smaller one. 0 is no better than
    guessing, 2 without an error.

    Args:
        source: features (N, D), N ≥ 4.
        target: features (M, D), M ≥ 4.
        seed: of the halves.

    Raises:
        UserError: for fewer than 4 samples of a domain.

    Source: Ben-David et al. 2007, "Analysis of Representations for Domain Adaptation", section 4 (proxy A-distance).
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    count = min(len(source), len(target))
    if count < 4:
        raise UserError(f"a_distance needs at least 4 samples of each domain, not {len(source)} and {len(target)}")
    stream = torch.Generator().manual_seed(seed)
    chosen = [x[torch.randperm(len(x), generator=stream)[:count].to(x.device)] for x in (source, target)]
    features = torch.cat(chosen).double().cpu().numpy()
    domain = torch.arange(2).repeat_interleave(count).numpy()
    halves = StratifiedKFold(2, shuffle=True, random_state=seed)
    accuracy = cross_val_score(domain_classifier(), features, domain, cv=halves).mean()
    return float(min(max(2 * (2 * accuracy - 1), 0.0), 2.0))
