"""A linear probe: a frozen backbone whose features are computed once."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from zoo.core.fingerprints import fingerprint
from zoo.core.network import Network


class Probe(Network):
    """A network of which only the head learns; the features of an image seen before are remembered.

    The backbone is pinned in evaluation mode and has no gradient, so its features are a function of the image alone:
    they are kept by the image's fingerprint, on the CPU in half precision, and every later epoch costs a matrix
    product. Random views are not wrong, they are merely new every time; choose a fixed one (``Identity``). Nothing of
    it is in a checkpoint.

    Args:
        num_outputs: C.
        resize: enlarge images to this height and width (bilinear) first: pretrained backbones find little in 28 pixels.
        mean: what the incoming images' normalisation subtracted; with ``std``, undone before the backbone's own.
        std: what it divided by.
        own_mean: the backbone's normalisation, 0.5 for EfficientNet-Lite.
        own_std: likewise.
        cache_size: samples to remember at most; a thousand EfficientNet-Lite0 features take 2.6 MB.
        low_precision: compute features under bfloat16 autocast.
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
        cache_size: int = 200_000,
        low_precision: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_outputs, **kwargs)
        self.resize, self.cache_size, self.low_precision = resize, cache_size, low_precision
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.backbone.requires_grad_(False).eval()
        self.rows: dict[int, int] = {}  # fingerprint to row of the store
        self.store: list[Tensor] = []

    def train(self, mode: bool = True) -> Self:
        """Only the head changes mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, D), computed or remembered."""
        keys = fingerprint(x).tolist()
        known = [key in self.rows for key in keys]
        features = torch.empty(len(x), self.num_features, device=x.device)
        new = torch.tensor([i for i, k in enumerate(known) if not k], dtype=torch.long)
        old = torch.tensor([i for i, k in enumerate(known) if k], dtype=torch.long)
        if len(old):
            rows = [self.store[self.rows[keys[i]]] for i in old.tolist()]
            features[old.to(x.device)] = torch.stack(rows).to(x.device).float()
        if len(new):
            computed = self._compute(x[new.to(x.device)])
            # what is returned is what will be remembered, so that a second pass gives the same
            half = computed.half().cpu()
            features[new.to(x.device)] = half.to(x.device).float()
            for i, row in zip(new.tolist(), half, strict=True):
                if len(self.store) < self.cache_size:
                    self.rows[keys[i]] = len(self.store)
                    self.store.append(row)
        return features

    def _compute(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.shift
        if self.resize is not None:
            x = interpolate(x, size=(self.resize, self.resize), mode="bilinear", align_corners=False)
        channels = self.backbone.in_channels
        if channels is not None and x.shape[1] == 1:
            x = x.expand(-1, channels, -1, -1)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.low_precision):
            return super().features(x).float()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": {}, "store": []}
