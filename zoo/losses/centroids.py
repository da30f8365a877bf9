"""Labels by the nearest of centroids that the samples themselves define."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


def centroid_labels(
    features: Tensor, probabilities: Tensor, distance: Literal["cosine", "euclidean"] = "cosine", min_count: int = 0
) -> Tensor:
    r"""The class of the nearest centroid, of samples that define the centroids themselves.

    .. math:: c_k = \frac{\sum_i a_{ik} f_i}{\sum_i a_{ik}}, \qquad \hat y_i = \arg\min_k d(f_i, c_k)

    twice: first with the probabilities as a, then with the labels found. A class that nobody predicts has no centroid.
    For the cosine distance a 1 is appended to the features, which are then scaled to length 1, as in the code.

    Args:
        features: f (N, D).
        probabilities: (N, C).
        distance: d.
        min_count: classes that as many samples or fewer are predicted to be of have no centroid.

    Returns:
        Labels (N,).

    Source: Liang et al. 2020, arXiv 2002.08546, equations 4-6; ``obtain_label`` of the authors' code.
    """
    shares, labels, classes = probabilities, probabilities.argmax(dim=1), probabilities.shape[1]
    cosine = distance == "cosine"
    if cosine:
        features = normalize(torch.cat([features, features.new_ones(len(features), 1)], dim=1), dim=1)
    for _ in range(2):
        centroids = shares.T @ features / (shares.sum(dim=0)[:, None] + 1e-8)
        away = -features @ normalize(centroids, dim=1).T if cosine else torch.cdist(features, centroids)
        counts = torch.bincount(labels, minlength=classes)
        labels = away.masked_fill(counts <= min_count, torch.inf).argmin(dim=1)
        shares = one_hot(labels, classes).to(features.dtype)
    return labels
