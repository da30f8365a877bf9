"""A pretrained network for small images, all of which learns."""

from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from zoo.core.network import Network


class Enlarged(Network):
    """A network that enlarges its images and brings them to its own normalisation: fine-tuning beside probing.

    Its input is that of :class:`~zoo.weak_to_strong.probe.Probe`, so one takes the other's place in a config; here the
    backbone learns too.

    Args:
        num_outputs: C.
        resize: height and width to enlarge to (bilinear): pretrained backbones find little in 28 pixels.
        mean: what the incoming images' normalisation subtracted; with ``std``, undone before the backbone's own.
        std: what it divided by.
        own_mean: the backbone's normalisation, 0.5 for EfficientNet-Lite.
        own_std: likewise.
        **kwargs: see :class:`~zoo.core.network.Network`. Grey images are repeated to the backbone's channels.
    """

    def __init__(
        self,
        num_outputs: int,
        resize: int | None = None,
        mean: float = 0.5,
        std: float = 0.5,
        own_mean: float = 0.5,
        own_std: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_outputs, **kwargs)
        self.resize, self.scale, self.shift = resize, std / own_std, (mean - own_mean) / own_std

    def features(self, x: Any) -> Tensor:
        """Images (B, C, H, W) to features (B, D)."""
        return super().features(self.enlarge(x))

    def enlarge(self, x: Any) -> Any:
        """Images as the backbone knows them; what is no image stays."""
        channels = self.backbone.in_channels
        if channels is None:
            return x
        x = x * self.scale + self.shift
        if self.resize is not None:
            x = interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)
        return x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x
