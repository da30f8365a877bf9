"""Harnessing Hard Mixed Samples with Decoupled Regularizer.

Liu et al., NeurIPS 2023, https://arxiv.org/abs/2203.10761
"""

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.losses import blend, cutmix, decoupled_binary_cross_entropy, decoupled_regularizer, mixed_targets
from zoo.losses import mixing_shares as draw
from zoo.semi_supervised.consistency import require_pixels
from zoo.semi_supervised.supervised import Supervised


class DecoupledMixup(Supervised):
    r"""Mixed samples may be confident of both their classes.

    .. math:: L = \tfrac1B \sum_b \Big( H\big(\lambda e_{a} + (1 - \lambda) e_{b},\, p(\tilde x)\big)
        + \eta \big( \lambda^s r_a + (1 - \lambda)^s r_b \big) \Big), \qquad
        r_a = -\log \frac{e^{z_a}}{\sum_{c \ne b} e^{z_c}}

    :math:`\tilde x` is every sample mixed with another one of its batch, by mixup or CutMix. The cross-entropy alone
    wants the two classes to share the probability, which hard samples that show one class only cannot give; the
    regularizer asks of each to beat all others but its partner. ``loss="binary"`` has one sigmoid for each class, whose
    answers may sum to more than 1. η = 0 (or threshold = power = 1) is plain mixup.

    Batch: ``labeled`` {image, label}.

    Args:
        mixing: ``"mixup"`` blends images, ``"cutmix"`` pastes boxes.
        alpha: of the Beta distribution of λ, ≥ 0; 0 mixes nothing.
        loss: ``"softmax"``, whose first term is ``criterion`` with soft labels, or ``"binary"``, without a criterion.
        eta: :math:`\eta` ≥ 0, for softmax.
        share_power: s ≥ 0, for softmax: 0 is the paper's equation, 1 and 0.5 its released code.
        threshold: for binary: shares from here on count as 1, see :func:`~zoo.losses.rescale`.
        power: for binary: the exponent of smaller shares.
        per_sample: draw λ for every sample rather than one for the batch, as the released code does.
        **kwargs: see :class:`~zoo.semi_supervised.supervised.Supervised`.

    Raises:
        UserError: if an argument is out of its range; in training, for inputs that are not pixels.

    Source: Liu et al. 2023, arXiv 2203.10761, section 4.
    """

    card = Card(
        title="Harnessing Hard Mixed Samples with Decoupled Regularizer",
        year=2023,
        paper="arXiv:2203.10761",
        family="semi_supervised",
        roles=("labeled",),
    )

    def __init__(
        self,
        mixing: Literal["mixup", "cutmix"] = "mixup",
        alpha: float = 1.0,
        loss: Literal["softmax", "binary"] = "softmax",
        eta: float = 0.1,
        share_power: float = 0.0,
        threshold: float = 1.0,
        power: float = 1.0,
        per_sample: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in {"alpha": alpha, "eta": eta, "share_power": share_power, "power": power}.items():
            if value < 0.0:
                raise UserError(f"DecoupledMixup: {name}={value} must not be negative")
        if mixing not in ("mixup", "cutmix") or loss not in ("softmax", "binary"):
            raise UserError(
                f"DecoupledMixup: mixing={mixing!r} must be 'mixup' or 'cutmix', loss={loss!r} 'softmax' or 'binary'"
            )
        if not 0.0 < threshold <= 1.0:
            raise UserError(f"DecoupledMixup: threshold={threshold} must lie in (0, 1]")
        self.mixing, self.alpha, self.loss, self.per_sample = mixing, alpha, loss, per_sample
        self.eta, self.share_power, self.threshold, self.power = eta, share_power, threshold, power

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Mix the batch with itself, and ask for both classes."""
        x, first = batch["labeled"]["image"], batch["labeled"]["label"]
        require_pixels(self, x)
        partners = torch.randperm(len(x)).to(x.device, non_blocking=True)
        second = first[partners]
        share = draw(len(x) if self.per_sample else 1, self.alpha, dominant=False).to(x.device, non_blocking=True)
        if self.mixing == "mixup":
            mixed = blend(x, x[partners], share)
        else:
            mixed, share = cutmix(x, x[partners], share)
        logits = self.network(mixed)
        if self.loss == "binary":
            loss = decoupled_binary_cross_entropy(logits, first, second, share, self.threshold, self.power)
            return self.report(supervised=loss.mean())
        regularizer = decoupled_regularizer(logits, first, second, share, self.share_power)
        return self.report(
            supervised=self.criterion(logits, mixed_targets(first, second, share, self.num_classes)),
            decoupled=self.eta * regularizer.mean(),
        )
