"""What the zoo contains, read from source text: no import of torch, so that ``zoo list`` answers at once.

A method is a public class with a ``card = Card(...)`` of literal arguments in one of the family folders; adding the
file is all it takes to be listed, to be importable as ``zoo.NAME`` and to be known to the command line.
"""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
FAMILIES = ("semi_supervised", "domain_adaptation", "distillation", "weak_to_strong", "weak_segmentation")


@dataclass(frozen=True)
class Entry:
    """One method as its source file states it."""

    name: str
    module: str
    path: Path
    title: str
    year: int
    paper: str
    family: str
    roles: tuple[str, ...]
    docstring: str

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.docstring.strip().split("\n", 1)[0]


@dataclass(frozen=True)
class Argument:
    """One constructor argument: its name, annotation and default as written, and the class that declares it."""

    name: str
    annotation: str
    default: str | None
    owner: str


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _module_name(path: Path) -> str:
    return ".".join(path.resolve().relative_to(PACKAGE.parent).with_suffix("").parts)


def _card(node: ast.ClassDef) -> dict[str, Any] | None:
    """Arguments of ``card = Card(...)``, None when the class has no card of its own."""
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names = [statement.target.id]
        else:
            continue
        if "card" in names and isinstance(statement.value, ast.Call):
            return {word.arg: ast.literal_eval(word.value) for word in statement.value.keywords if word.arg}
    return None


def method_files(package: Path = PACKAGE) -> Iterator[Path]:
    """The source files of all families, in a fixed order."""
    for family in FAMILIES:
        yield from sorted(path for path in (package / family).glob("*.py") if not path.name.startswith("_"))


@functools.cache
def methods(package: Path = PACKAGE) -> dict[str, Entry]:
    """Every method by name, by family and then by name.

    Raises:
        ValueError: two files define a method of the same name.
    """
    found: dict[str, Entry] = {}
    for path in method_files(package):
        for node in _tree(path).body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            card = _card(node)
            if card is None:
                continue
            if node.name in found:
                raise ValueError(f"method {node.name} is defined in both {found[node.name].path} and {path}")
            found[node.name] = Entry(
                name=node.name,
                module=".".join(path.relative_to(package.parent).with_suffix("").parts),
                path=path,
                title=card["title"],
                year=card["year"],
                paper=card["paper"],
                family=card["family"],
                roles=tuple(card["roles"]),
                docstring=ast.get_docstring(node) or "",
            )
    return dict(sorted(found.items(), key=lambda item: (FAMILIES.index(item[1].path.parent.name), item[0].lower())))


def _find_class(module: str, name: str, depth: int = 0) -> tuple[ast.ClassDef, ast.Module] | None:
    """The class `name` as seen from `module`, following imports inside this project."""
    base = PACKAGE.parent.joinpath(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if depth > 8 or not path.is_file():
        return None
    tree = _tree(path)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, tree
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find_class(node.module, alias.name, depth + 1)
    return None


def arguments(entry: Entry) -> list[Argument]:
    """Constructor arguments of a method with their defaults, inherited ones last."""
    result: dict[str, Argument] = {}
    module, name = entry.module, entry.name
    for _ in range(8):
        found = _find_class(module, name)
        if found is None:
            break
        node, tree = found
        inherits = True
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                inherits = item.args.kwarg is not None
                for argument in _signature(item, node.name):
                    result.setdefault(argument.name, argument)
        bases = [base for base in node.bases if isinstance(base, ast.Name)]
        if not inherits or not bases:
            break
        name = bases[0].id
        module = _origin(tree, name, module)
    return list(result.values())


def _origin(tree: ast.Module, name: str, module: str) -> str:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            return node.module
    return module


def _signature(function: ast.FunctionDef, owner: str) -> Iterator[Argument]:
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    for argument, default in pairs:
        if argument.arg != "self":
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            yield Argument(argument.arg, annotation, ast.unparse(default) if default is not None else None, owner)


def config_folders() -> list[Path]:
    """Folders where configs are looked for: beside the caller, then beside the package."""
    folders = [Path("configs"), PACKAGE.parent / "configs"]
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.is_dir():
            seen.setdefault(folder.resolve(), folder)
    return list(seen.values())


def _names_class(text: str, name: str) -> bool:
    key = r"(?:model:|class_path:|-\s*class_path:)"
    return re.search(rf"^\s*{key}\s*[\"']?(?:[\w.]+\.)?{name}\b", text, re.M) is not None


def configs(name: str | None = None) -> list[Path]:
    """YAML files under configs/, or only those whose text names the class."""
    found = []
    for folder in config_folders():
        for path in sorted(folder.rglob("*.yaml")):
            if name is None or _names_class(path.read_text(encoding="utf-8"), name):
                found.append(path)
    return found


def checkpoints(name: str | None = None, runs: Path | str = "runs", limit: int = 5) -> list[Path]:
    """The newest checkpoints under `runs`, or only those of runs whose config names the class."""
    folder = Path(runs)
    if not folder.is_dir():
        return []
    found = []
    for path in folder.rglob("*.ckpt"):
        config = run_config(path)
        if name is None or (config is not None and _names_class(config.read_text(encoding="utf-8"), name)):
            found.append(path)
    return sorted(found, key=lambda path: (-path.stat().st_mtime, str(path)))[:limit]


def run_folder(checkpoint: Path | str) -> Path:
    """The run folder of a checkpoint: the parent of ``checkpoints/``, or the folder that the file lies in."""
    parent = Path(checkpoint).parent
    return parent.parent if parent.name == "checkpoints" else parent


def run_config(checkpoint: Path | str) -> Path | None:
    """The config.yaml of the run that wrote a checkpoint, None when there is none."""
    path = run_folder(checkpoint) / "config.yaml"
    return path if path.is_file() else None
