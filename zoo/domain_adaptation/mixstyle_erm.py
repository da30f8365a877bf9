"""Domain Generalization with MixStyle.

Zhou et al., ICLR 2021, https://arxiv.org/abs/2104.02008
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.core.card import Card
from zoo.core.errors import UserError, check_choice, suggest
from zoo.domain_adaptation.generalization import Batch, DomainGeneralization
from zoo.losses.domain_means import cross_domain_partners, mean_over_domains
from zoo.losses.mixup import mixing_shares
from zoo.losses.style import mix_styles


class MixStyle(DomainGeneralization):
    r"""Between shallow layers, every image takes on some of the style of another one.

    .. math:: x' = \bar\sigma \frac{x - \mu}{\sigma} + \bar\mu, \qquad \bar\mu = \lambda \mu + (1 - \lambda) \mu_\pi,
        \quad \bar\sigma = \lambda \sigma + (1 - \lambda) \sigma_\pi, \quad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    Means and deviations are those of a sample's feature maps, channel by channel; the label stays. After each of the
    named layers it happens with probability p, and in training only: what is evaluated is the plain network. Every rank
    draws for itself.

    Batch: ``source`` {image, label, domain}; for ``mix="crossdomain"`` as many samples of every domain.

    Args:
        layers: sub-modules of the library's network whose outputs, maps (B, C, H, W) or positions (B, N, C), are mixed:
            ``["layer1", "layer2"]`` of a ResNet, ``["stages.0"]`` of ours.
        probability: p in [0, 1].
        alpha: α > 0.
        mix: ``"random"`` takes any sample for the other one, ``"crossdomain"`` one of the next domain, the domains
            standing in a random ring. (The authors' code swaps the two halves of a batch of two domains.)
        **kwargs: see :class:`~zoo.domain_adaptation.generalization.DomainGeneralization`.

    Raises:
        UserError: if an argument is out of its range, or for a layer that the network has not.

    Source: Zhou et al. 2021, arXiv 2104.02008, section 3.2; defaults as in the authors' code.
    """

    card = Card(
        title="Domain Generalization with MixStyle",
        year=2021,
        paper="arXiv:2104.02008",
        family="domain_adaptation",
        roles=("source",),
    )

    def __init__(
        self,
        layers: Sequence[str],
        probability: float = 0.5,
        alpha: float = 0.1,
        mix: Literal["random", "crossdomain"] = "random",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not layers or isinstance(layers, str):
            raise UserError(f"MixStyle: layers={layers!r} must be a list with at least one name")
        if not 0.0 <= probability <= 1.0 or not alpha > 0.0:
            raise UserError(f"MixStyle: probability={probability} must lie in [0, 1] and alpha={alpha} be positive")
        check_choice("MixStyle", "mix", mix, ("random", "crossdomain"))
        self.layers, self.probability, self.alpha, self.mix = list(layers), probability, alpha, mix

    def build(self) -> None:
        """The network, which must have the layers."""
        super().build()
        names = [name for name, _ in self.library_network.named_modules()]
        for layer in self.layers:
            if layer not in names:
                shallow = ", ".join(name for name in names if name and name.count(".") < 2)
                raise UserError(
                    f"MixStyle: the network has no layer {layer!r}.{suggest(layer, names)} It has {shallow}"
                )

    @property
    def library_network(self) -> nn.Module:
        """The backbone's own network, to which the names of layers refer."""
        return getattr(self.network.backbone, "model", self.network.backbone)

    @contextmanager
    def mixing(self, domain: Tensor) -> Iterator[None]:
        """Inside, the layers mix the styles of samples of these domains (B,)."""

        def after(layer: nn.Module, inputs: Any, output: Any) -> Any:
            if not self.training or torch.rand(()) >= self.probability:  # on the host
                return None
            shape: tuple[int, ...] = tuple(output.shape) if isinstance(output, Tensor) else ()
            positions = shape[1] if len(shape) == 3 else shape[2] * shape[3] if len(shape) == 4 else 0
            if positions < 2 or shape[0] != len(domain):
                raise UserError(
                    f"MixStyle: what {type(layer).__name__} gives is no feature map; name a shallower layer"
                )
            share = mixing_shares(len(domain), self.alpha, dominant=False).to(output.device)
            return mix_styles(output, share, self.partners(domain))

        with ExitStack() as stack:
            for name in self.layers:
                handle = self.library_network.get_submodule(name).register_forward_hook(after)
                stack.callback(handle.remove)
            yield

    def partners(self, domain: Tensor) -> Tensor:
        """Row of the other sample (B,)."""
        shuffle = torch.randperm(len(domain)).to(domain.device)
        if self.mix == "random":
            return shuffle
        places, _ = cross_domain_partners(domain[shuffle], self.num_domains, torch.randperm(self.num_domains))
        return shuffle[places][shuffle.argsort()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Fit the labels in all styles."""
        source = batch["source"]
        with self.mixing(source["domain"]):
            logits = self.network(source["image"])
        return self.report(source=mean_over_domains(*self.risks(logits, source)))
