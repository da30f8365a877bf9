"""What discriminators of single classes know of the target's labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.core.distributed import sum_with_gradient, world_size


def refined_log_probabilities(logits: Tensor, domains: Tensor) -> Tensor:
    r"""Predictions weighed by how much a sample looks like a target sample of each class.

    .. math:: \rho_k = \frac{\sigma(-v_k)\, p_k}{\sum_{k'} \sigma(-v_{k'})\, p_{k'}}

    Bayes' rule with the classifier's :math:`p` as the prior; equal :math:`v` leave it as it is. The authors' code
    multiplies logits instead of probabilities.

    Args:
        logits: of the classifier (B, C).
        domains: v, a domain logit for every class (B, C), positive for source; no gradient flows to them.

    Returns:
        :math:`\log \rho` (B, C), in at least 32 bits.

    Source: Lv et al. 2021, arXiv 2112.04137, target-prediction refinement and mimicking.
    """
    if logits.element_size() < 4:
        logits, domains = logits.float(), domains.float()
    return (logits.log_softmax(dim=1) + F.logsigmoid(-domains.detach())).log_softmax(dim=1)


def mutual_information(log_probabilities: Tensor) -> Tensor:
    r"""Between samples and classes, :math:`H(\bar p) - \tfrac1B \sum_b H(p_b) \in [0, \log C]`.

    :math:`\bar p` is the mean prediction of all ranks. Minus this is the target-classification-mimicking loss.

    Args:
        log_probabilities: log p (B, C).

    Source: Lv et al. 2021, arXiv 2112.04137, target-prediction refinement and mimicking.
    """
    p = log_probabilities.exp()
    mean = sum_with_gradient(p.mean(dim=0)) / world_size()
    return (p * log_probabilities).sum(dim=1).mean() - (mean * mean.clamp_min(1e-30).log()).sum()


def class_domain_loss(source: Tensor, target: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    r"""Cross-entropy of one domain discriminator a class, on the samples that are of the class.

    .. math:: \frac1{2C} \sum_k \Big( \frac1{B_s} \sum_i [y_i = k] \operatorname{softplus}(-v_{ik}^s) + \frac1{B_t}
        \sum_j \rho_{jk} \operatorname{softplus}(v_{jk}^t) \Big)

    Args:
        source: v of source samples (B_s, C), positive for source.
        target: v of target samples (B_t, C).
        labels: y (B_s,).
        shares: ρ (B_t, C), how much of each target sample is of each class; no gradient flows to them.

    Source: Lv et al. 2021, arXiv 2112.04137, target-prediction refinement. The authors' code masks the whole
    batch by the last sample's label.
    """
    if source.element_size() < 4:
        source, target = source.float(), target.float()
    own = F.softplus(-source.gather(1, labels.unsqueeze(1))).mean()
    other = (shares.detach() * F.softplus(target)).sum(dim=1).mean()
    return (own + other) / (2 * source.shape[1])
