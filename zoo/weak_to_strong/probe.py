"""A linear probe: a frozen backbone whose features are computed once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from zoo.core.errors import UserError, check_choice
from zoo.core.feature_cache import FeatureCache, address_of, default_folder, input_keys
from zoo.weak_to_strong.enlarged import Enlarged

Stamp = tuple[tuple[int, int], ...]


class Probe(Enlarged):
    r"""A network of which only the head (and the neck) learns; the features of an input seen before are remembered.

    .. math:: z = h(\phi(x)), \quad \phi \text{ frozen}

    The backbone is pinned in evaluation mode and has no gradient, so its features are a function of the input alone.
    They are kept in half precision by the input's fingerprint, in memory and in files that later runs and other
    processes read, see :class:`~zoo.core.feature_cache.FeatureCache`; every later epoch costs a matrix product.
    The files belong to the backbone's very weights and to what is done to its input: any change makes new ones.
    Random views are not wrong, they are merely new every time; choose a fixed one (``Identity``). Nothing of it is in a
    checkpoint.

    Inputs: images (B, C, H, W), token ids (B, N), or a dict of ``input_ids`` and ``attention_mask``.

    Args:
        num_outputs: C.
        cache: ``disk``, or ``memory`` for this process alone.
        cache_folder: where the files lie; by default ``$XDG_CACHE_HOME/labelight/features`` or below ``~/.cache``.
            It may be deleted at any time.
        cache_size: samples to remember at most; a thousand EfficientNet-Lite0 features take 2.6 MB.
        cache_gib: of all files in the folder, in GiB; those of the network that was not used for longest go first.
        low_precision: compute features under bfloat16 autocast.
        **kwargs: ``resize``, ``mean`` and the like of :class:`~zoo.weak_to_strong.enlarged.Enlarged`, and
            :class:`~zoo.core.network.Network`.

    Raises:
        UserError: for a cache without a size, or adapters, which a frozen backbone would not train.
    """

    def __init__(
        self,
        num_outputs: int,
        cache_size: int = 200_000,
        low_precision: bool = False,
        cache: Literal["disk", "memory"] = "disk",
        cache_folder: str | None = None,
        cache_gib: float = 4.0,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("lora") is not None:
            raise UserError("Probe: its backbone is frozen, adapters (lora) would never train; take Network")
        check_choice("Probe", "cache", cache, ("disk", "memory"))
        if cache_size < 1 or cache_gib <= 0:
            raise UserError(f"Probe: cache_size={cache_size} must be at least 1, cache_gib={cache_gib} positive")
        super().__init__(num_outputs, **kwargs)
        self.cache_size, self.low_precision = cache_size, low_precision
        self.cache_folder: Path | None = None
        if cache == "disk":
            self.cache_folder = default_folder() if cache_folder is None else Path(cache_folder).expanduser()
        self.cache_bytes = int(cache_gib * 2**30)
        self.backbone.requires_grad_(False).eval()
        self._cache: FeatureCache | None = None
        self._stamps: tuple[Stamp, Stamp] | None = None

    def train(self, mode: bool = True) -> Self:
        """Only the head changes mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, x: Any) -> Tensor:
        """Inputs to features (B, D), computed or remembered."""
        with torch.no_grad():
            if self.backbone.in_channels is None:
                x = self.prepare(x)
            keys = input_keys(x)
            remembered = self._cache_on(keys.device)(keys, lambda some: self._compute(_take(x, some)))
        return self.neck(remembered)

    def _compute(self, x: Any) -> Tensor:
        """What the frozen backbone says (B, D), not remembered."""
        x = self.enlarge(x)
        kind = (next(iter(x.values())) if isinstance(x, Mapping) else x).device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.low_precision):
            return self.backbone.features(self.prepare(x)).float()

    def _cache_on(self, device: torch.device) -> FeatureCache:
        """The store that belongs to the backbone as it is now."""
        if self._cache is None or not self._unchanged():
            if self._cache is not None:
                self._cache.flush()
            sharded = any(hasattr(p, "full_tensor") for p in self.backbone.parameters())
            about = {
                "backbone": type(getattr(self.backbone, "model", self.backbone)).__name__,
                "scale": self.scale,
                "shift": self.shift,
                "resize": self.resize,
                "channels_last": self.channels_last,
                "bfloat16": self.low_precision,
                "device": device.type,
                "matmul": torch.get_float32_matmul_precision(),
            }
            # Of a sharded backbone no process has the bytes: it remembers for itself.
            address = "sharded" if sharded else address_of(self.backbone, *about.items())
            folder = None if sharded else self.cache_folder
            self._cache = FeatureCache(
                address, self.backbone.num_features, folder, self.cache_size, self.cache_bytes, about
            )
            self._sharded = sharded
            self._watched = list(self.backbone.modules())
            self._stamps = self._now()
            self._buffers_then = [b.detach().clone() for b in self.backbone.buffers()]
        return self._cache

    def _now(self) -> tuple[Stamp, Stamp]:
        parameters = [p for module in self._watched for p in module._parameters.values() if p is not None]
        buffers = [b for module in self._watched for b in module._buffers.values() if b is not None]
        return _stamp(parameters), _stamp(buffers)

    def _unchanged(self) -> bool:
        """Whether no weight was written to since the store was opened; counters of PyTorch say so without reading."""
        if self._sharded or (now := self._now()) == self._stamps:
            return True
        assert self._stamps is not None
        if now[0] != self._stamps[0]:
            return False
        # Plain ddp writes rank 0's buffers over everybody's at every step; nearly always they are the same.
        buffers = list(self.backbone.buffers())
        same = len(buffers) == len(self._buffers_then) and all(
            a.device == b.device and torch.equal(a, b) for a, b in zip(buffers, self._buffers_then, strict=True)
        )
        self._stamps = now
        return same

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_stamps": None, "_buffers_then": [], "_watched": []}


def _stamp(tensors: Sequence[Tensor]) -> Stamp:
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)


def _take(x: Any, some: Tensor) -> Any:
    return {name: value[some] for name, value in x.items()} if isinstance(x, Mapping) else x[some]
