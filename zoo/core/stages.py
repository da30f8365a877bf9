"""The stages of a backbone, and what stands behind one of them for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from zoo.core.errors import UserError, suggest
from zoo.core.network import Network


def stages_of(network: Network, names: list[str] | None = None) -> list[nn.Module]:
    """The stages of a network's backbone, the shallowest first.

    Args:
        network: whose backbone is meant.
        names: of its modules; the four last stages where a timm or torchvision network has them.

    Raises:
        UserError: for names that are not there; without names, where the backbone does not tell its stages.
    """
    model = network.backbone.model
    if names is None:
        told = [part["module"] for part in getattr(model, "feature_info", None) or []]
        names = told[-4:] or [f"layer{number}" for number in range(1, 5) if hasattr(model, f"layer{number}")]
    parts = dict(model.named_modules())
    if not names or not set(names) <= parts.keys():
        missing = next((name for name in names if name not in parts), "")
        raise UserError(f"stages={names} are not all in {type(model).__name__}.{suggest(missing, parts)}")
    return [parts[name] for name in names]


@contextmanager
def behind(stage: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, what a stage gives is changed, before anything else that is behind it."""
    hook = stage.register_forward_hook(lambda module, inputs, maps: change(maps), prepend=True)
    try:
        yield
    finally:
        hook.remove()
