"""ITTA: Improved Test-Time Adaptation for Domain Generalization.

Chen et al., CVPR 2023, https://arxiv.org/abs/2304.04494
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.core.affine import Affines
from zoo.core.card import Card
from zoo.core.errors import UserError, check_choice
from zoo.core.network import Network
from zoo.core.stages import behind, stages_of
from zoo.domain_adaptation.test_time import GradientAdaptation
from zoo.losses.gradient_alignment import alignment_of_losses, gradient_only
from zoo.losses.mixup import mixing_shares
from zoo.losses.style import mix_styles


class ITTA(GradientAdaptation):
    r"""Features that stay when the style changes, by a loss that has learnt to help the classifier.

    .. math:: \Theta: \ H(y, z) + H(y, z') + L_c, \quad L_c = \overline{f_w(z' - z)^2}, \qquad
        w: \ \alpha \lVert N(\nabla_\Theta L_c) - \mathrm{sg}[N(\nabla_\Theta (H(y, z) + H(y, z')))] \rVert^2 / P

    z and z' are the features of an image and of the same image in a style mixed with another one's, behind the first or
    the second stage. f is ten elementwise affine layers with ReLU between, the identity of what is positive at first,
    so that negative differences cost nothing until w has moved. N standardises, see
    :func:`~zoo.losses.gradient_alignment.gradient_alignment`. Both minimizations take their gradients at the same place
    and from the same views, with one optimizer; the authors' code steps in Θ first, and for w passes forward again.

    When tested, five elementwise affine layers with ReLU between stand behind every stage, the identity at first for
    features that are not negative. They alone descend on :math:`L_c`, and then the batch is predicted. The authors
    never set them back, so that their figures depend on the order of the test sets; here every set begins anew. A batch
    of one image has no other style: it is not adapted to, and the authors evaluate by such batches.

    Batch: ``source`` {image, label}, of one or several domains; at test {image, label}.

    Args:
        alignment_weight: α ≥ 0, 0.1 in the authors' code.
        style_alpha: of the shares' Beta distribution, 0.1.
        consistency_layers: of f, at least 1.
        adaptive_layers: behind every stage, at least 1.
        adaptive: ``"element"``, a scale and a shift for each element of the maps, which then must all be of one size,
            or ``"channel"``, ours, for each channel.
        adaptation_weight: of :math:`L_c` when tested, the authors' ``ada_lr``: 1e-6, 0.1 for DomainNet. Adam hardly
            notices it: with a loss that small, its ε does.
        stages: names of the stages inside the backbone; its four last where a timm or torchvision network has them.
        freeze_batch_norm: BatchNorm stays in evaluation mode in training, as in DomainBed, for pretrained networks.
            Otherwise its running averages see both views.
        adaptation_optimizer: as in the authors' code, Adam at a rate of 5e-6.
        **kwargs: see :class:`~zoo.domain_adaptation.test_time.GradientAdaptation`; predicted is after the step. w is
            learnt at a tenth of the rate unless ``lr_multipliers`` has a ``consistency``. Authors: Adam, 5e-5.

    Raises:
        UserError: for an argument out of its range, a stage that is not there, or inputs that are not images.

    Source: Chen et al. 2023, arXiv 2304.04494, equations 1-7 and algorithm 1.
    """

    card = Card(
        title="Improved Test-Time Adaptation for Domain Generalization",
        year=2023,
        paper="arXiv:2304.04494",
        family="domain_adaptation",
        roles=("source",),
    )
    published_prediction = "after"
    test_arguments = (*GradientAdaptation.test_arguments, "adaptive", "adaptive_layers", "adaptation_weight")

    def __init__(
        self,
        alignment_weight: float = 0.1,
        style_alpha: float = 0.1,
        consistency_layers: int = 10,
        adaptive_layers: int = 5,
        adaptive: Literal["element", "channel"] = "element",
        adaptation_weight: float = 1e-6,
        stages: list[str] | None = None,
        freeze_batch_norm: bool = True,
        adaptation_optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=5e-6),
        lr_multipliers: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        multipliers = {"consistency": 0.1, **(lr_multipliers or {})}
        super().__init__(adaptation_optimizer=adaptation_optimizer, lr_multipliers=multipliers, **kwargs)
        numbers = {"alignment_weight": alignment_weight, "style_alpha": style_alpha}
        for name, value in (numbers | {"adaptation_weight": adaptation_weight}).items():
            if not value >= 0:
                raise UserError(f"ITTA: {name}={value} must not be negative")
        for name, value in {"consistency_layers": consistency_layers, "adaptive_layers": adaptive_layers}.items():
            if value < 1:
                raise UserError(f"ITTA: {name}={value} must be at least 1")
        check_choice("ITTA", "adaptive", adaptive, ("element", "channel"))
        self.alignment_weight, self.style_alpha = alignment_weight, style_alpha
        self.adaptation_weight = adaptation_weight
        self.consistency_layers, self.adaptive_layers, self.adaptive = consistency_layers, adaptive_layers, adaptive
        self.stages, self.freeze_batch_norm = stages, freeze_batch_norm

    def build(self) -> None:
        """The network, and what weighs the differences of its features."""
        super().build()
        self.consistency = Affines((self.network.num_features,), self.consistency_layers)

    def train(self, mode: bool = True) -> Self:
        """Keep BatchNorm in evaluation mode, if asked."""
        super().train(mode)
        for layer in self.modules() if self.freeze_batch_norm else ():
            if isinstance(layer, _BatchNorm):
                layer.eval()
        return self

    # Training ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels in both styles; let w make the consistency help with that."""
        source = batch["source"]
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            clean, mixed = self.views(self.network, source["image"])
        terms = {
            "clean": cross_entropy(self.network.logits(clean), source["label"]),
            "mixed": cross_entropy(self.network.logits(mixed), source["label"]),
        }
        fixed = {name: p.detach() for name, p in self.consistency.named_parameters()}
        change = difference(mixed, clean)
        terms["consistency"] = torch.func.functional_call(self.consistency, fixed, (change,)).square().mean()
        own = self.consistency(change).square().mean()
        alignment = alignment_of_losses(own, terms["clean"] + terms["mixed"], self.theta)
        self.observe(alignment=alignment)
        steer = gradient_only(self.alignment_weight * alignment, list(self.consistency.parameters()))
        return self.report(**terms) + steer

    @property
    def theta(self) -> list[nn.Parameter]:
        """What makes the features: all but the head."""
        head = {id(p) for p in self.network.head.parameters()}
        return [p for p in self.network.parameters() if p.requires_grad and id(p) not in head]

    def views(self, network: Network, x: Any) -> tuple[Tensor, Tensor]:
        """Features (B, D) of images, and of the same in mixed styles: one pass up to where the styles part."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise UserError("ITTA: styles are those of images, and these inputs are none")
        first = stages_of(network, self.stages)[:2]
        shares, partners = mixing_shares(len(x), self.style_alpha, dominant=False), torch.randperm(len(x))

        def double(maps: Tensor) -> Tensor:
            mixed = mix_styles(maps, shares, partners.to(maps.device))
            return torch.cat([maps, mixed])

        with behind(first[int(torch.randint(len(first), ()))], double):
            clean, mixed = network.features(x).chunk(2)
        return clean, mixed

    # Test -------------------------------------------------------------------------------------------------------------

    def prepare_copy(self, network: Network) -> dict[str, nn.Parameter]:
        """Affine layers behind every stage; they are made when maps come by and their sizes are known."""
        self.inserted: dict[int, Affines] = {}
        for number, stage in enumerate(stages_of(network, self.stages)):
            stage.register_forward_hook(partial(self.insert, number))
        return {}

    def insert(self, number: int, module: nn.Module, inputs: Any, maps: Tensor) -> Tensor:
        """What the affine layers behind a stage make of its maps."""
        whole = tuple(maps.shape[1:])
        channels = (whole[0], 1, 1) if maps.dim() == 4 else whole[-1:]
        shape = whole if self.adaptive == "element" else channels
        if number not in self.inserted:
            self.inserted[number] = Affines(shape, self.adaptive_layers).to(maps.device)
        layers = self.inserted[number]
        if layers.shape != shape:
            raise UserError(
                f"ITTA: adaptive='element' needs maps of one size, but {shape} came after {layers.shape}: 'channel'"
            )
        return layers(maps).to(maps.dtype)

    def learn(self, x: Any) -> Tensor:
        """Make the features agree in both styles."""
        clean, mixed = self.views(self.adapted, x)
        if not self.now.named:
            layers = self.inserted.items()
            self.now.named = {f"{number}.{name}": p for number, part in layers for name, p in part.named_parameters()}
        loss = self.adaptation_weight * self.consistency(difference(mixed, clean)).square().mean()
        self.step(self.gradients(loss))
        return self.adapted.logits(clean)


def difference(mixed: Tensor, clean: Tensor) -> Tensor:
    """The change from z to z', in 32 bits or more."""
    return mixed.float() - clean.float() if clean.element_size() < 4 else mixed - clean
