"""Which parameters learn, how fast, and with how much decay."""

from collections import defaultdict
from typing import Any

from torch import nn

from zoo.core.errors import UserError, suggest


def parameter_groups(
    module: nn.Module, lr_multipliers: dict[str, float] | None = None, decay_norms_and_biases: bool = False
) -> list[dict[str, Any]]:
    """The trainable parameters of ``module`` in groups for an optimizer.

    Args:
        module: whose parameters, in the order of ``named_parameters``.
        lr_multipliers: learning-rate multiples by the beginning of a parameter's name; the longest match counts.
        decay_norms_and_biases: whether weight decay also acts on parameters with fewer than two dimensions.

    Returns:
        Groups ``{"params", "lr_multiplier"}``, with ``"weight_decay": 0.0`` where nothing decays.

    Raises:
        UserError: if a name in ``lr_multipliers`` matches no trainable parameter.
    """
    multipliers = lr_multipliers or {}
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for prefix in multipliers:
        if not any(_matches(name, prefix) for name in names):
            choices = {".".join(name.split(".")[: i + 1]) for name in names for i in range(name.count("."))}
            raise UserError(f"lr_multipliers: no trainable parameter begins with {prefix!r}.{suggest(prefix, choices)}")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            prefix = max((p for p in multipliers if _matches(name, p)), key=len, default="")
            groups[multipliers.get(prefix, 1.0), decay_norms_and_biases or parameter.ndim > 1].append(parameter)
    return [
        {"params": parameters, "lr_multiplier": multiplier, **({} if decays else {"weight_decay": 0.0})}
        for (multiplier, decays), parameters in groups.items()
    ]


def _matches(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
