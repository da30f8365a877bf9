"""SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised Learning.

Chen et al., ICLR 2023, https://arxiv.org/abs/2301.10921
"""

from collections.abc import Callable
from typing import Any

from zoo.core.card import Card
from zoo.policies import Policy, TruncatedGaussian
from zoo.semi_supervised.fixmatch import FixMatch


class SoftMatch(FixMatch):
    r"""FixMatch with weights in place of a threshold: every sample counts, the unsure ones less.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + \lambda \tfrac1{\mu B} \sum_b w(q_b)\, H(\hat q_b, p(A(u_b))), \quad
        w(q) = \exp\!\left(-\frac{n_\sigma^2 \min(\max UA(q) - \mu_t, 0)^2}{2 \sigma_t^2}\right)

    :math:`UA` aligns predictions to the uniform distribution, for the weight only; :math:`\mu_t` and
    :math:`\sigma_t^2` follow the confidence, see :class:`~zoo.policies.truncated_gaussian.TruncatedGaussian`.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy.
        **kwargs: see :class:`~zoo.semi_supervised.fixmatch.FixMatch`.

    Source: Chen et al. 2023, arXiv 2301.10921: truncated Gaussian function and uniform alignment.
    """

    card = Card(
        title="SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised Learning",
        year=2023,
        paper="arXiv:2301.10921",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(self, policy: Callable[[int], Policy] = TruncatedGaussian, **kwargs: Any) -> None:
        super().__init__(policy=policy, **kwargs)
