"""Unsupervised Data Augmentation for Consistency Training.

Xie et al., NeurIPS 2020, https://arxiv.org/abs/1904.12848
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.core.card import Card
from zoo.core.criteria import CrossEntropy
from zoo.core.errors import UserError
from zoo.losses import annealed_cross_entropy, annealing_threshold
from zoo.policies import Policy, Threshold
from zoo.semi_supervised.fixmatch import FixMatch


class UDA(FixMatch):
    r"""Sharpened predictions on weak views are the targets of the strong views; labels are released gradually.

    .. math:: L = \frac1Z \sum_b \mathbb 1[p_{y_b}(x_b) \le \eta_t]\, H(y_b, p(x_b)) + \lambda \tfrac1{\mu B} \sum_b
        \mathbb 1[\max q_b \ge \tau]\, H\!\left(\mathrm{softmax}(z(\alpha(u_b)) / T),\; p(A(u_b))\right)

    The confidence is read before sharpening. :math:`\eta_t` is of
    :func:`~zoo.losses.annealing.annealing_threshold`; :math:`Z` counts the labeled samples that are kept. The paper
    writes a divergence where this is a cross-entropy: the gradient is the same.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy; by default :math:`\tau = 0.8` and :math:`T = 0.4`.
        annealing: how labels are released: ``"linear"``, ``"log"`` or ``"exp"`` over the run; ``None`` = all at once,
            as in the paper's runs on images.
        **kwargs: see :class:`~zoo.semi_supervised.fixmatch.FixMatch`.

    Raises:
        UserError: if ``annealing`` is unknown, or the criterion is not cross-entropy when it is used.

    Source: Xie et al. 2020, arXiv 1904.12848, with its additional training techniques; the image code for τ and T.
    """

    card = Card(
        title="Unsupervised Data Augmentation for Consistency Training",
        year=2020,
        paper="arXiv:1904.12848",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self,
        policy: Callable[[int], Policy] = lambda num_classes: Threshold(
            num_classes, threshold=0.8, temperature=0.4, soft=True
        ),
        annealing: Literal["linear", "log", "exp"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy=policy, **kwargs)
        if annealing not in (None, "linear", "log", "exp"):
            raise UserError(f"UDA: annealing={annealing!r} must be 'linear', 'log', 'exp' or None")
        self.annealing = annealing

    def build(self) -> None:
        """The networks and the policy."""
        super().build()
        if self.annealing is not None and type(self.criterion) is not CrossEntropy:
            raise UserError(f"UDA: annealing works with CrossEntropy, not with {type(self.criterion).__name__}")

    def losses(
        self, batch: dict[str, dict[str, Tensor]], outputs: tuple[Tensor, ...], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Fit the labels that are released, and the strong views to the sharpened weak views."""
        terms = super().losses(batch, outputs, targets)
        if self.annealing is not None and isinstance(self.criterion, CrossEntropy):
            threshold = annealing_threshold(self.progress, self.num_classes, self.annealing)
            labels, smoothing = batch["labeled"]["label"], self.criterion.label_smoothing
            terms["supervised"] = annealed_cross_entropy(outputs[0], labels, threshold, smoothing)
            self.observe(annealing_threshold=torch.tensor(threshold))
        return terms
