"""Labelight: learning when labels are few, weak, or from somewhere else.

Importing this package imports nothing heavy. The first access to any public name imports every method, because
Lightning rebuilds a checkpoint only from classes that are already imported.
"""

import importlib
from typing import Any

# The building blocks of the public surface. Methods are added by `zoo.catalog`: every class with a card.
_BLOCKS = {
    "Card": "zoo.core.card",
    "EMA": "zoo.core.teachers",
    "Frozen": "zoo.core.teachers",
    "Method": "zoo.core.method",
    "Network": "zoo.core.network",
    "load": "zoo.hub",
}

_loading = False


def _public() -> dict[str, str]:
    """Public names and the modules that define them."""
    from zoo.catalog import methods

    return {**_BLOCKS, **{name: entry.module for name, entry in methods().items()}}


def _import_methods() -> None:
    """Import every method module once; does nothing when a method module asks for a name while being imported."""
    global _loading
    if _loading:
        return
    _loading = True
    from zoo.catalog import methods

    try:
        for entry in methods().values():
            importlib.import_module(entry.module)
    except BaseException:
        _loading = False  # a failed import is reported again at the next access, not hidden
        raise


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("labelight")
    if name == "__all__":
        return sorted([*_public(), "__version__"])
    if name.startswith("_"):
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    public = _public()
    if name not in public:
        from zoo.core.errors import suggest

        raise AttributeError(f"module 'zoo' has no attribute {name!r}.{suggest(name, public)}")
    _import_methods()
    value = getattr(importlib.import_module(public[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_public(), "__version__", "__all__"})
