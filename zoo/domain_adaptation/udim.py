"""Unknown Domain Inconsistency Minimization for Domain Generalization (UDIM).

Shin et al., ICLR 2024, https://arxiv.org/abs/2403.07329
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, normalize

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.distributed import world_size
from zoo.core.errors import UserError, check_choice
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.losses.inconsistency import gradient_size, gradient_variance_gap
from zoo.optim.sam import SAM
from zoo.optim.virtual import averaged_gradients, with_parameters


class UDIM(DomainAdaptation):
    r"""Flat minima on the source whose flatness an unknown domain, made of the source's worst images, shares.

    .. math:: L = H(y, p_{\theta + \hat\epsilon}(x)) + w \big( D_{var}(x, \tilde x) + D_{norm}(\tilde x) \big), \qquad
        \hat\epsilon = \rho \, g / \lVert g \rVert, \quad g = \nabla_\theta H(y, p_\theta(x))

    The first term is that of SAM. :math:`\tilde x` climbs the loss of the worst weights nearby, in one step along

    .. math:: \nabla_x \big( H(y, p_\theta(x)) + \rho \lVert g \rVert \big)

    which differentiates the gradient g once more. D compares what every sample's loss would do to the head
    (:func:`~zoo.losses.inconsistency.gradient_variance_gap`, :func:`~zoo.losses.inconsistency.gradient_size`). All
    terms have one backward pass and one optimizer: :math:`\theta + \hat\epsilon` is computed beside
    :math:`\theta`, which does not move. BatchNorm remembers the first pass alone, on x with :math:`\theta`.

    Training begins with SAM only. The authors then go on from the best checkpoint on the source's validation: as two
    runs, the first with ``warmup: 1`` and the second with ``warmup: 0`` and the first's checkpoint in
    ``network.weights``. What is said of the authors' code is at commit 808f1b2; it has no running statistics in
    BatchNorm and evaluates with those of the test batch, which is not followed.

    Batch: ``source`` {image, label}; images, with a linear head on top.

    Args:
        perturbation: ``"pixels"`` moves every pixel, each image by ``step_size`` in Euclidean norm (the authors' code
            divides each pixel's gradient by its norm over the batch, so that images depend on each other);
            ``"style"`` moves only mean and standard deviation of each image's channels, as AdvStyle does, by
            ``step_size`` times the gradient of the batch's mean loss. The authors' script for a single source switches
            it on, that for several does not. (Their code makes the image before the step, so that it stays as it was.)
        step_size: ≥ 0, in units of the normalised images. 10 in the authors' scripts.
        inconsistency_weight: w ≥ 0; with 0 this is SAM, and with ``rho=0`` besides it is the source-only baseline.
        rho: ρ ≥ 0, the radius of SAM.
        warmup: share of training with SAM only, in [0, 1].
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`, where x̃ takes the target's place: with
            ``forward_pass="joint"``, as published, x and x̃ are normalised together.

    Raises:
        UserError: if an argument is out of its range, for a head that is not linear, or inputs that are no images.

    Source: Shin et al. 2024, arXiv 2403.07329, and the authors' code.
    """

    card = Card(
        title="Unknown Domain Inconsistency Minimization for Domain Generalization",
        year=2024,
        paper="arXiv:2403.07329",
        family="domain_adaptation",
        roles=("source",),
    )
    target_views: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        perturbation: Literal["pixels", "style"] = "pixels",
        step_size: float = 10.0,
        inconsistency_weight: float = 1.0,
        rho: float = 0.05,
        warmup: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("UDIM", "perturbation", perturbation, ("pixels", "style"))
        for name, value in (("step_size", step_size), ("inconsistency_weight", inconsistency_weight), ("rho", rho)):
            if not value >= 0.0:
                raise UserError(f"UDIM: {name}={value} must not be negative")
        if not 0.0 <= warmup <= 1.0:
            raise UserError(f"UDIM: warmup={warmup} must lie in [0, 1]")
        self.perturb = perturb_pixels if perturbation == "pixels" else perturb_style
        self.step_size, self.inconsistency_weight, self.warmup = step_size, inconsistency_weight, warmup
        self.sam = SAM(rho)

    def build(self) -> None:
        """The network, whose head has gradients in closed form."""
        super().build()
        if not isinstance(self.network.head, nn.Linear):
            raise UserError(f"UDIM: the head must be Linear, not {type(self.network.head).__name__}")

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source with the worst weights nearby, and have the worst images nearby bend the loss alike."""
        x, labels = batch["source"]["image"], batch["source"]["label"]
        parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not self.inconsistency_weight or self.progress < self.warmup:
            above = self.sam.perturbed(cross_entropy(self.network(x), labels), parameters)
            return self.report(source=self.loss_above(above, x, labels))
        if not x.is_floating_point():
            raise UserError(f"UDIM: perturbs images, and inputs of {x.dtype} are none; inconsistency_weight: 0 is SAM")
        perturbed, climb = self.perturb(x, self.step_size, lambda free: self.objective(free, labels, parameters))
        above = {name: parameters[name] + step for name, step in climb.items()}
        source = self.loss_above(above, x, labels)
        head: Any = self.network.head
        with frozen_batch_norm(self.network):
            h, h_perturbed = self.both(x, perturbed, lambda x: self.network.dropout(self.network.features(x)))
            with torch.autocast(x.device.type, enabled=False):
                z, z_perturbed = (head(f.to(head.weight.dtype)) for f in (h, h_perturbed))
        bias = head.bias is not None
        variance = gradient_variance_gap((h, z), (h_perturbed, z_perturbed), labels, bias)
        size = gradient_size(h_perturbed, z_perturbed, labels, bias)
        self.observe(variance_gap=variance, gradient_size=size)
        return self.report(source=source, inconsistency=self.inconsistency_weight * (variance + size))

    def objective(self, x: Tensor, labels: Tensor, parameters: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """What images climb, with the step of SAM: its gradient is that of the loss plus ρ times the norm of g."""
        with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
            loss = cross_entropy(self.network(x), labels)
        with torch.autocast(x.device.type, enabled=False):
            found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
            gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
            climb = self.sam.perturbation(averaged_gradients({name: g.detach() for name, g in gradients.items()}))
            sharpness = torch.stack([(step * gradients[name]).sum() for name, step in climb.items()]).sum()
        return (loss + sharpness) / world_size(), climb

    def loss_above(self, parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        """The source loss at θ + ε; the step is a constant, so its gradient is that of θ."""
        with frozen_batch_norm(self.network):
            return cross_entropy(with_parameters(self.network, parameters, self.network, x), labels)


Objective = Callable[[Tensor], tuple[Tensor, Any]]


def perturb_pixels(x: Tensor, step_size: float, objective: Objective) -> tuple[Tensor, Any]:
    """Images (B, ...) moved uphill by ``step_size`` in Euclidean norm, each; and what the objective says besides."""
    free = x.detach().requires_grad_()
    value, more = objective(free)
    (uphill,) = torch.autograd.grad(value, free)
    return x + step_size * normalize(uphill.flatten(1), dim=1).view_as(x), more


def perturb_style(x: Tensor, step_size: float, objective: Objective) -> tuple[Tensor, Any]:
    """Images (B, C, H, W) whose channels' means and standard deviations were moved uphill by their gradients."""
    mean = x.mean(dim=(2, 3), keepdim=True).detach()
    std = (x.var(dim=(2, 3), keepdim=True) + 1e-5).sqrt().detach()  # n - 1 and 1e-5 as in AdvStyle
    content = (x.detach() - mean) / std
    style = (mean.requires_grad_(), std.requires_grad_())
    value, more = objective(content * std + mean)
    uphill_mean, uphill_std = torch.autograd.grad(value, style)
    return (content * (std + step_size * uphill_std) + mean + step_size * uphill_mean).detach(), more
