r"""Classes from domains: domains that differ in their class frequencies only, and no label anywhere.

With :math:`p(x|y)` the same in every domain, the domain posterior is linear in the class posterior,

.. math:: q(d|x) = \sum_y p(d|y)\, p(y|x), \quad p(d|y) = \frac{p(y|d)}{\sum_{d'} p(y|d')}

for domains of one size, and so are the frequencies of any discrete function of the input,
:math:`p(c|d) = \sum_y p(c|y)\, p(y|d)`. The second equation gives the class frequencies of every domain by a
non-negative factorization, the first one then the classes.

Source: Roberts, Mani, Garg and Lipton 2022, "Unsupervised Learning under Latent Label Shift", arXiv 2207.13179.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.core.errors import UserError

__all__ = [
    "Factors",
    "MatchedAccuracy",
    "adjust",
    "class_frequencies",
    "class_probabilities",
    "cluster_frequencies",
    "discretize",
    "domain_given_class",
    "domain_rank",
    "factorize",
    "match_classes",
    "prior_error",
]


def discretize(probabilities: Tensor, clusters: int, restarts: int = 5, seed: int = 0) -> Tensor:
    """Clusters (N,) of domain probabilities (N, R), by k-means.

    Args:
        probabilities: q(d|x), (N, R).
        clusters: m, at most N; never fewer than the classes that are looked for.
        restarts: starts of k-means, of which the tightest clustering counts.
        seed: of the starts.

    Raises:
        UserError: for more clusters than samples.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if not 1 <= clusters <= len(probabilities):
        raise UserError(f"discretize: clusters={clusters} must be at least 1 and at most {len(probabilities)} samples")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: the rest stay empty
        means = KMeans(clusters, n_init=restarts, max_iter=100, random_state=seed)
        labels = means.fit_predict(probabilities.double().cpu().numpy())
    return torch.from_numpy(labels).long()


def cluster_frequencies(clusters: Tensor, domains: Tensor, num_clusters: int, num_domains: int) -> Tensor:
    """p(c|d), (M, R) float64, whose columns sum to 1: domains of any size count alike.

    Args:
        clusters: (N,) in 0..M-1.
        domains: (N,) in 0..R-1.
        num_clusters: M.
        num_domains: R.

    Raises:
        UserError: for a domain without a sample.
    """
    cells = torch.bincount(clusters * num_domains + domains, minlength=num_clusters * num_domains)
    counts = cells.view(num_clusters, num_domains).double()
    sizes = counts.sum(dim=0)
    if bool((sizes == 0).any()):
        raise UserError(f"cluster_frequencies: domain {int(sizes.argmin())} of {num_domains} has no sample")
    return counts / sizes


def domain_rank(frequencies: Tensor, samples: int) -> int:
    r"""How many singular values of p(c|d) stand out of the noise of counting.

    Counts of n samples a domain disturb the matrix by about :math:`n^{-1/2} (1 + (\max_c \sum_d p(c|d))^{1/2})` in the
    spectral norm. Fewer than the number of classes: the domains do not determine the classes. One: they cannot be told
    apart.

    Args:
        frequencies: p(c|d), (M, R).
        samples: n, of the smallest domain.
    """
    noise = (1 + float(frequencies.sum(dim=1).max()) ** 0.5) / samples**0.5
    return int((torch.linalg.svdvals(frequencies.double()) > noise).sum())


@dataclass(frozen=True)
class Factors:
    """A factorization :math:`p(c|d) ≈ p(c|y) p(y|d)`; the order of the classes means nothing.

    Args:
        cluster_given_class: (M, K), columns sum to 1.
        class_given_domain: (K, R), columns sum to 1.
        error: Frobenius norm of what is not explained.
    """

    cluster_given_class: Tensor
    class_given_domain: Tensor
    error: float


def factorize(frequencies: Tensor, num_classes: int, restarts: int = 10, seed: int = 0) -> Factors:
    """Non-negative factorization of p(c|d) (M, R) into K classes, by scikit-learn.

    Args:
        frequencies: p(c|d), (M, R), columns sum to 1.
        num_classes: K, at most M and R.
        restarts: random starts, of which the one with the smallest error counts: the problem is not convex.
        seed: of the starts.

    Raises:
        UserError: for more classes than clusters or domains.
    """
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    clusters, domains = frequencies.shape
    if not 1 <= num_classes <= min(clusters, domains):
        raise UserError(
            f"factorize: {num_classes} classes need at least as many clusters and domains; "
            f"there are {clusters} clusters and {domains} domains"
        )
    rows = frequencies.double().cpu().numpy().T
    best: tuple[float, Any, Any] | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for start in range(restarts):
            model = NMF(num_classes, init="random", random_state=seed + start, max_iter=2000, tol=1e-6)
            priors = model.fit_transform(rows)
            if best is None or model.reconstruction_err_ < best[0]:
                best = float(model.reconstruction_err_), priors, model.components_
    assert best is not None  # there is at least one start
    error, priors, components = best[0], torch.from_numpy(best[1]).T, torch.from_numpy(best[2]).T
    scale = components.sum(dim=0)
    priors = priors * scale[:, None]
    return Factors(components / scale.clamp_min(1e-12), priors / priors.sum(dim=0).clamp_min(1e-12), error)


def class_frequencies(
    probabilities: Tensor,
    domains: Tensor,
    num_classes: int,
    clusters: int,
    held_out: Tensor | None = None,
    restarts: int = 10,
    seed: int = 0,
) -> tuple[Tensor, int]:
    """From what a discriminator of domains says of samples, p(y|d) (K, R) and the :func:`domain_rank`.

    Args:
        probabilities: q(d|x), (N, R).
        domains: of the samples, (N,).
        num_classes: K.
        clusters: m, of :func:`discretize`.
        held_out: (N,) bool, which of them it was not trained on. Only they count for the rank, if there are any: what
            was trained on looks more different than it is.
        restarts: of :func:`factorize`.
        seed: of both.
    """
    number = probabilities.shape[1]
    found = discretize(probabilities, clusters, seed=seed)
    frequencies = cluster_frequencies(found, domains, clusters, number)
    factors = factorize(frequencies, num_classes, restarts, seed)
    if held_out is not None and bool(held_out.any()):
        found, domains = found[held_out], domains[held_out]
        frequencies = cluster_frequencies(found, domains, clusters, number)
    return factors.class_given_domain, domain_rank(frequencies, int(domains.bincount().min()))


def domain_given_class(class_given_domain: Tensor) -> Tensor:
    """p(d|y), (R, K) with columns that sum to 1, of p(y|d) (K, R) and domains of one size."""
    joint = class_given_domain.mT
    return joint / joint.sum(dim=0, keepdim=True).clamp_min(1e-12)


def class_probabilities(domain_probabilities: Tensor, class_given_domain: Tensor, clip: bool = True) -> Tensor:
    r"""The classes that explain what is said of the domain: :math:`p(y|x) = p(d|y)^+ q(d|x)`, (B, K).

    They are those of a sample drawn from all domains together. With estimates the solution may leave the simplex:
    ``clip`` sets what is negative to 0 and normalises, which the authors' code does not.

    Args:
        domain_probabilities: q(d|x), (B, R).
        class_given_domain: p(y|d), (K, R).
        clip: whether rows are probabilities.
    """
    inverse = torch.linalg.pinv(domain_given_class(class_given_domain))
    solved = domain_probabilities @ inverse.mT.to(domain_probabilities.dtype)
    return _normalized(solved.clamp_min(0), torch.full_like(solved, 1 / solved.shape[1])) if clip else solved


def adjust(probabilities: Tensor, class_given_domain: Tensor, domains: Tensor) -> Tensor:
    r"""The classes of samples whose domain is known: :math:`p(y|x, d) \propto p(d|y)\, p(y|x)`, (B, K).

    Where p(y|x) leaves no class that the domain has, the domain's own frequencies remain.

    Args:
        probabilities: p(y|x), (B, K).
        class_given_domain: p(y|d), (K, R).
        domains: (B,) in 0..R-1.
    """
    rows = domain_given_class(class_given_domain).to(probabilities.dtype)[domains]
    return _normalized(rows * probabilities, class_given_domain.mT.to(probabilities.dtype)[domains])


def _normalized(values: Tensor, otherwise: Tensor) -> Tensor:
    total = values.sum(dim=1, keepdim=True)
    return torch.where(total > 0, values / total.where(total > 0, torch.ones_like(total)), otherwise)


def match_classes(confusion: Tensor) -> Tensor:
    """The true class of each found one, (K,): the one-to-one assignment under which most samples agree.

    Args:
        confusion: (K, K) numbers of samples, rows the found class, columns the true one.
    """
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(confusion.cpu().numpy(), maximize=True)[1]).long()


def prior_error(found: Tensor, true: Tensor, matching: Tensor) -> float:
    r"""Mean over the domains of :math:`\sum_y |p(y|d) - \hat p(y|d)|`, in [0, 2].

    Args:
        found: (K, R), in the order of the found classes.
        true: (K, R).
        matching: (K,), of :func:`match_classes`. The authors sum over the domains.
    """
    ordered = torch.zeros_like(true)
    ordered[matching] = found.to(true)
    return float((ordered - true).abs().sum(dim=0).mean())


class MatchedAccuracy(Metric):
    """Accuracy of classes without names, after the best one-to-one matching of found to true classes.

    Fed with scores (B, K) and labels (B,); samples with label -1 do not count. ``confusion`` (K, K) has a row for each
    found class; ``matching`` (K,), after :meth:`compute`, is the true class of each found one.

    Args:
        num_classes: K.
    """

    matching: Tensor
    higher_is_better = True
    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch."""
        cells = torch.where(labels >= 0, scores.argmax(dim=1) * self.num_classes + labels, self.num_classes**2)
        counts = torch.zeros(self.num_classes**2 + 1, dtype=torch.long, device=cells.device)
        counts = counts.scatter_add_(0, cells, torch.ones_like(cells))
        self.confusion = self.confusion + counts[:-1].view_as(self.confusion)

    def compute(self) -> Tensor:
        """The share of samples that agree."""
        self.matching = match_classes(self.confusion)
        agreeing = self.confusion.gather(1, self.matching.to(self.confusion.device).unsqueeze(1))
        return agreeing.sum() / self.confusion.sum().clamp_min(1)
