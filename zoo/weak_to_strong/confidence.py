"""Weak-to-Strong Generalization: the auxiliary confidence loss.

Burns et al., 2023, https://arxiv.org/abs/2312.09390
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.distributed import mean_across_ranks
from zoo.losses.confidence import confidence_ramp, harden, soft_cross_entropy
from zoo.weak_to_strong.naive import NaiveWeakToStrong


class ConfidenceWeakToStrong(NaiveWeakToStrong):
    r"""A strong student fits the weak labels and, more and more, its own confident predictions.

    .. math:: L = (1 - \alpha) \tfrac1B \sum_b H(w(x_b), f(x_b)) + \alpha \tfrac1B \sum_b H(\hat f_t(x_b), f(x_b))

    The hardened prediction :math:`\hat f_t` carries no gradient. Its threshold t is set so that the classes are as
    frequent as in the weak labels (:func:`~zoo.losses.confidence.harden`): without it the student strengthens its own
    bias. α grows linearly over the first ``warmup`` of training, because early predictions are noise.

    The paper has two classes and takes t from the batch. For more, the prior of the weak labels and the student's own
    mean prediction are running means over batches (``momentum``), so small batches do not move the thresholds much.

    Batch: ``weak`` {image, probabilities, hidden_label (watched only)}.

    Args:
        confidence_weight: the final α in [0, 1]: 0.75 for the paper's largest students, 0.5 for the others. With 0 it
            is :class:`~zoo.weak_to_strong.naive.NaiveWeakToStrong`, bit for bit.
        warmup: fraction of training over which α grows, in [0, 1].
        match_prior: set thresholds by the weak labels' prior; otherwise the plain arg max.
        momentum: of the two running means, in [0, 1).
        released_ramp: the released code's ramp, which jumps to the full weight at the end of the warm-up.
        **kwargs: ``hard_labels`` of :class:`~zoo.weak_to_strong.naive.NaiveWeakToStrong`, and
            :class:`~zoo.core.method.Method`.

    Source: Burns et al. 2023, arXiv 2312.09390, section 4.3.2 and appendix A.4, eq. 1.
    """

    card = Card(
        title="Weak-to-Strong Generalization: auxiliary confidence loss",
        year=2023,
        paper="arXiv:2312.09390",
        family="weak_to_strong",
        roles=("weak",),
    )
    prior: Tensor
    marginal: Tensor
    batches: Tensor

    def __init__(
        self,
        confidence_weight: float = 0.5,
        warmup: float = 0.2,
        match_prior: bool = True,
        momentum: float = 0.99,
        released_ramp: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("confidence_weight", confidence_weight), ("warmup", warmup)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"ConfidenceWeakToStrong: {name}={value} must lie in [0, 1]")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"ConfidenceWeakToStrong: momentum={momentum} must lie in [0, 1)")
        self.confidence_weight, self.warmup, self.match_prior = confidence_weight, warmup, match_prior
        self.momentum, self.released_ramp = momentum, released_ramp
        self.register_buffer("prior", torch.zeros(self.num_classes))
        self.register_buffer("marginal", torch.zeros(self.num_classes))
        self.register_buffer("batches", torch.zeros(()))

    @property
    def alpha(self) -> float:
        """α at this step."""
        return self.confidence_weight * confidence_ramp(self.progress, self.warmup, self.released_ramp)

    @torch.no_grad()
    def confident(self, logits: Tensor, weak: Tensor) -> Tensor:
        """The student's own hard labels (B,), by the weak labels' prior."""
        p = logits.detach().float().softmax(dim=1)
        if not self.match_prior:
            return p.argmax(dim=1)
        if self.num_classes == 2:
            return harden(p, weak.mean(dim=0))
        self.batches += 1
        # the first batches are averaged evenly, so that no start value remains
        momentum = torch.minimum(1 - 1 / self.batches, self.batches.new_tensor(self.momentum))
        self.prior.lerp_(mean_across_ranks(weak.float().mean(dim=0)), 1 - momentum)
        self.marginal.lerp_(mean_across_ranks(p.mean(dim=0)), 1 - momentum)
        return harden(p, self.prior, self.marginal)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the weak labels and the student's own."""
        weak, alpha = batch["weak"], self.alpha
        logits, targets = self.network(weak["image"]), self.targets(weak)
        own = self.confident(logits, targets)
        self.watch(weak, logits)
        return self.report(
            weak=(1 - alpha) * soft_cross_entropy(logits, targets),
            confidence=alpha * cross_entropy(logits, own),
        )
