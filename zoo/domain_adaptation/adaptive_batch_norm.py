"""Adaptive Batch Normalization, and its online forms.

Li et al., Pattern Recognition 2018 (first 2016), https://arxiv.org/abs/1603.04779
Schneider et al., NeurIPS 2020, https://arxiv.org/abs/2006.16971
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.core.card import Card
from zoo.core.distributed import sum_across_ranks
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.test_time import TestTimeAdaptation


class AdaptiveBatchNorm(TestTimeAdaptation):
    r"""BatchNorm normalises the target by the target's statistics; nothing is learnt, no gradient is taken.

    .. math:: \bar\mu = \frac{N}{N + n} \mu_s + \frac{n}{N + n} \mu_t, \qquad
        \bar\sigma^2 = \frac{N}{N + n} \sigma_s^2 + \frac{n}{N + n} \sigma_t^2

    :math:`\mu_s, \sigma_s^2` are the running averages of training, :math:`\mu_t, \sigma_t^2` (biased, as BatchNorm's
    own in training) those of the n target samples:

    - ``mode="episodic"``: of the batch at hand, the default. With N = 0 the baseline "norm" of test-time adaptation.
    - ``mode="online"``: of all batches so far.
    - ``whole_set=True``: of the whole test set, by a pass through it before the first prediction, in which the layers
      further down normalise by their batches. This is what Li et al. call AdaBN.

    A batch is predicted with statistics that know it. Several ranks take their statistics together.

    Batch: ``source`` {image, label}; at test {image, label}.

    Args:
        prior: N ≥ 0, how many target samples the source's statistics are worth; infinity changes nothing. Schneider et
            al. recommend 16 for ImageNet networks and batches of 8 to 32, and 0 for large batches.
        whole_set: see above.
        **kwargs: see :class:`~zoo.domain_adaptation.test_time.TestTimeAdaptation`.

    Raises:
        UserError: for a negative prior, and for ``whole_set`` in mode ``"episodic"``; when tested, for a network
            without BatchNorm, or one without running averages to mix with.

    Source: Schneider et al. 2020, arXiv 2006.16971, equation 1; Li et al. 2018, arXiv 1603.04779, algorithm 1.
    """

    card = Card(
        title="Revisiting Batch Normalization For Practical Domain Adaptation",
        year=2016,
        paper="arXiv:1603.04779",
        family="domain_adaptation",
        roles=("source",),
    )
    published_mode = "episodic"
    test_arguments = ("mode", "prior", "whole_set")

    def __init__(self, prior: float = 0.0, whole_set: bool = False, **kwargs: Any) -> None:
        if whole_set and kwargs.get("mode") is None:
            kwargs["mode"] = "online"
        super().__init__(**kwargs)
        if not prior >= 0:
            raise UserError(f"AdaptiveBatchNorm: prior={prior} must not be negative")
        if whole_set and self.mode == "episodic":
            raise UserError("AdaptiveBatchNorm: whole_set=true is of all batches together, mode='episodic' of each")
        self.prior, self.whole_set = prior, whole_set
        self._statistics: list[Statistics] = []

    def prepare_copy(self, network: Network) -> dict[str, nn.Parameter]:
        """Every BatchNorm layer asks its own statistics."""
        layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
        if not layers:
            raise UserError("AdaptiveBatchNorm: the network has no BatchNorm, so there is nothing to adapt")
        self._statistics = [Statistics(layer, self.prior) for layer in layers]
        return {}

    @torch.no_grad()
    def begin(self, images: Iterator[Any]) -> None:
        """Go through the whole set first, if asked."""
        if not self.whole_set:
            return
        for part in self._statistics:
            part.surveys = True
        for x in images:
            self.adapted(x)
        for part in self._statistics:
            part.surveys, part.done = False, True

    @torch.no_grad()
    def adapt(self, x: Any) -> Tensor:
        """Predict; the layers look at what comes by."""
        return self.adapted(x)


class Statistics:
    """Mean and variance of what a BatchNorm layer has met, which it normalises by from now on.

    Args:
        layer: in evaluation mode; its running averages are replaced by new tensors at every forward.
        prior: N, how many samples those that it has are worth.

    Raises:
        UserError: where it has none and the prior is not 0.
    """

    def __init__(self, layer: _BatchNorm, prior: float) -> None:
        if layer.running_mean is None and prior:
            raise UserError(f"AdaptiveBatchNorm: prior={prior} mixes with running averages, which BatchNorm lacks here")
        self.prior = prior
        self.source: tuple[Any, ...] = (layer.running_mean, layer.running_var)
        self.number = self.mean = self.variance = torch.zeros(())  # a number on the CPU goes with any device
        self.surveys = self.done = False
        layer.register_forward_pre_hook(self)

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        """Take a batch in, and set what the layer normalises it by."""
        batch = (self.mean, self.variance) if self.done else self.update(*batch_statistics(inputs[0]))
        layer.running_mean, layer.running_var = batch if self.surveys else self.mixed()

    def update(self, number: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of two sets give those of their union; returns the new set's own."""
        known = self.number
        total, delta = known + number, mean - self.mean
        spread = delta.square() * (known * number / total)
        self.variance = (known * self.variance + number * variance + spread) / total
        self.mean = self.mean + delta * (number / total)
        self.number = total
        return mean, variance

    def mixed(self) -> tuple[Tensor, ...]:
        """Mean and variance (C,), with those of the source in their share."""
        own = (self.mean, self.variance)
        if not self.prior:
            return own
        share = self.number / (self.number + self.prior)
        return tuple(torch.lerp(s.to(t), t, share) for s, t in zip(self.source, own, strict=True))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of samples (), mean (C,) and biased variance (C,) of a batch (B, C, ...), of all ranks together."""
    x = x.float() if x.element_size() < 4 else x
    dims = [0, *range(2, x.dim())]
    number = x.new_tensor(float(len(x)))
    variance, mean = torch.var_mean(x, dims, correction=0)
    everywhere = sum_across_ranks(number)
    joint = sum_across_ranks(number * mean) / everywhere
    return everywhere, joint, sum_across_ranks(number * (variance + (mean - joint).square())) / everywhere
