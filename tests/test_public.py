"""Checkpoints record `zoo.NAME`: a name that disappears makes old checkpoints unreadable."""

import subprocess
import sys

import pytest

import zoo
from zoo import catalog

# Names may be added. One that is removed or renamed breaks the checkpoints that carry it.
BLOCKS = {"Card", "EMA", "Frozen", "Method", "Network", "load", "__version__"}
METHODS = {
    "ConfidenceWeakToStrong",
    "DANN",
    "FixMatch",
    "KnowledgeDistillation",
    "NaiveWeakToStrong",
    "SourceOnly",
    "Supervised",
}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_promised_names_are_public():
    assert set(zoo.__all__) >= BLOCKS | METHODS


def test_public_surface_is_the_blocks_and_the_methods():
    assert set(zoo.__all__) == BLOCKS | set(catalog.methods())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_are_recorded_by_their_short_public_path(name):
    from jsonargparse._util import get_import_path

    from zoo.core.recording import import_path

    assert get_import_path(getattr(zoo, name)) == f"zoo.{name}"
    assert import_path(getattr(zoo, name)) == f"zoo.{name}"


def test_unknown_name_names_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean 'FixMatch'"):
        zoo.FixMach  # noqa: B018


def test_import_is_light_and_the_first_name_imports_every_method():
    heavy = "('torch', 'lightning', 'timm', 'transformers', 'rich')"
    out = python(
        "import sys, zoo\n"
        f"assert not [name for name in {heavy} if name in sys.modules]\n"
        "zoo.EMA\n"
        "from zoo import catalog\n"
        "missing = [e.module for e in catalog.methods().values() if e.module not in sys.modules]\n"
        "assert not missing, missing\n"
        "print('ok')"
    )
    assert out == "ok\n"


def test_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert zoo.__version__ == version("labelight")
