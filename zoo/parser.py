"""A parser whose errors are one sentence with the nearest match."""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from zoo.core.errors import UserError


class Parser(LightningArgumentParser):
    """LightningArgumentParser with short errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one message."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UserError(message) from ex


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"init_args.network.init_args.backbone": "lenet"}``."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if not isinstance(value, Mapping):
        return {prefix: value} if prefix else {}
    result: dict[str, Any] = {}
    for key, item in value.items():
        result.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return result
