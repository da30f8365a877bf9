"""Virtual Adversarial Training: a regularization method for supervised and semi-supervised learning.

Miyato et al., TPAMI 2018, https://arxiv.org/abs/1704.03976
"""

from typing import Any

import torch
from torch import Tensor

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.losses import entropy, virtual_adversarial_direction, virtual_adversarial_loss
from zoo.semi_supervised.consistency import Consistency, require_pixels


class VAT(Consistency):
    r"""Predictions do not change at distance ε, in the direction in which they change most.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b)) + r(t)\, \lambda\, \tfrac1{\mu B} \sum_b
        \mathrm{KL}\big(p(u_b) \,\|\, p(u_b + \varepsilon d_b)\big) + \lambda_e\, \tfrac1{\mu B} \sum_b H(p(u_b))

    :math:`d_b` is the unit vector of :func:`~zoo.losses.virtual_adversarial_direction`, found without a label and
    without touching the network: no gradient reaches its parameters, no batch its running averages. All that belongs to
    unlabeled samples is computed in the parameters' own precision, because autocast would round the small step away,
    and is normalised by their own batch. The first KL argument carries no gradient.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, hidden_label (watched only)}.

    Args:
        epsilon: ε ≥ 0, in units of the normalised input; the main thing to choose.
        xi: ξ > 0, the step that feels the curvature; 1e-6, as in released codes, drowns in 32-bit rounding.
        iterations: of the power method, ≥ 1.
        entropy_weight: :math:`\lambda_e` ≥ 0, not ramped; the paper's "VAT+EntMin" has 1.
        unlabeled_weight: λ ≥ 0; 0.3 as in the code of Oliver et al. 2018 (arXiv 1804.09170), 1 in the paper.
        **kwargs: ``ramp`` of :class:`~zoo.semi_supervised.consistency.Consistency`, and those of its bases;
            ``forward_pass`` must be ``"split"``.

    Raises:
        UserError: if an argument is out of its range; in training, for inputs that are not pixels.

    Source: Miyato et al. 2018, arXiv 1704.03976, equations 5 to 8 and section 3.3.
    """

    card = Card(
        title="Virtual Adversarial Training: A Regularization Method for Supervised and Semi-Supervised Learning",
        year=2018,
        paper="arXiv:1704.03976",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self,
        epsilon: float = 6.0,
        xi: float = 0.03,
        iterations: int = 1,
        entropy_weight: float = 0.06,
        unlabeled_weight: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(unlabeled_weight=unlabeled_weight, **kwargs)
        self.epsilon, self.xi, self.iterations, self.entropy_weight = epsilon, xi, iterations, entropy_weight
        if epsilon < 0.0 or entropy_weight < 0.0:
            raise UserError(f"VAT: epsilon={epsilon} and entropy_weight={entropy_weight} must not be negative")
        if xi <= 0.0 or iterations < 1:
            raise UserError(f"VAT: xi={xi} must be positive and iterations={iterations} at least 1")
        if self.forward_pass != "split":
            raise UserError(
                "VAT: forward_pass must be 'split', so that both sides of the divergence are normalised alike"
            )

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels, and the worst neighbours to the predictions."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        x = unlabeled["weak"]
        require_pixels(self, x)
        logits = self.network(labeled["image"])
        with torch.autocast(x.device.type, enabled=False), frozen_batch_norm(self.network):
            own = self.network(x)
            direction = virtual_adversarial_direction(
                self.network, x, own, torch.randn_like(x), self.xi, self.iterations
            )
            smoothness = virtual_adversarial_loss(self.network, x, own, direction, self.epsilon)
        self.watch(unlabeled, own.detach().argmax(dim=1), torch.ones_like(own[:, 0]))
        return self.report(
            supervised=self.criterion(logits, labeled["label"]),
            unlabeled=self.ramped * self.unlabeled_weight * smoothness,
            entropy=self.entropy_weight * entropy(own).mean(),
        )
