"""The spectrum of a batch of features."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.core.distributed import gather_with_gradient


def spectral_penalty(features: Tensor, directions: int = 1) -> Tensor:
    r"""The largest squared singular values of a batch, :math:`\sum_{i \le k} \sigma_i(F)^2`.

    Args:
        features: F (B, D), one sample a row; taken to 32 bits or more. The rows of all ranks count as one batch.
        directions: k; at most min(B, D) exist.

    Source: Chen et al. 2019, PMLR 97, batch spectral penalization.
    """
    features = gather_with_gradient(features)
    with torch.autocast(features.device.type, enabled=False):
        features = features.float() if features.element_size() < 4 else features
        return torch.linalg.svdvals(features)[:directions].square().sum()
