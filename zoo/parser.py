"""A parser whose errors are one sentence with the nearest match, where jsonargparse quotes every type it tried."""

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from zoo.core.errors import UserError, suggest

_PACKAGES = ("zoo", "datamodules", "callbacks")
_NEEDED = {
    "model": "a method: zoo list names them",
    "data": "a data module, such as SemiSupervisedData",
    "subcommand": "fit, validate, test or predict",
}


class Parser(LightningArgumentParser):
    """LightningArgumentParser that explains instead of quoting, and takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation that works today is another option tomorrow: `--trainer.max_epoch 3` is a typing error.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse; ``=None`` means null, as jsonargparse hands a nested null down to its inner parsers as that text."""
        if isinstance(args, list):
            args = [a[:-4] + "null" if isinstance(a, str) and a.endswith("=None") else a for a in args]
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`UserError` with one sentence; a parser that another one asks keeps its own way."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UserError(explain(message, self)) from ex


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


def explain(message: str, parser: LightningArgumentParser) -> str:
    """One sentence for an error of jsonargparse.

    Args:
        message: its text, which nests one paragraph per level of the config and one line per type that was tried.
        parser: the parser that raised it; its options are what a misspelt one is compared with.
    """
    # What was given is repeated at length at the end of each level: only the innermost values are of interest.
    text = re.sub(r"\n *Given value(?: type)?: .*", "", message)
    keys: list[str] = re.findall(r'Parser key "([^"]+)"', text)
    key = ".".join(keys)
    owners = re.findall(r"Problem with given class_path '([^']+)'", text)

    if found := re.search(r"Option '([^']+)' is not accepted", text):
        recipe = re.findall(r"Got value: Namespace\(class_path='([^']+)'", text)
        return _unknown_argument(found[1], (recipe or owners or [""])[-1 if owners and not recipe else 0])
    if found := re.search(r"does not accept option '([^']+)'", text):
        return _unknown_option(found[1], parser, dashes="")
    if found := re.search(r"unrecognized arguments: (.+)", text):
        return _unknown_option(found[1].split()[0].split("=")[0], parser, dashes="--")
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        return f"{key}: {found[1]!r} is not a known class.{suggest(found[1], _class_names(keys[-1] if keys else ''))}"
    if found := re.search(r"Multiple subclasses with name (\w+)\. .*?ambiguity: (.+?)\.?(?:\n|$)", text):
        return f"{key}: several classes are called {found[1]!r}; give the full path: {found[2]}"
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'(.*?)(?:\. Got value|\n|$)", text):
        hint = found[3].lstrip(".")
        hint = hint or suggest(found[2], _names_in(found[1]))
        return f"{key}: {found[1]} has no {found[2]!r}.{hint}"
    if found := re.search(r"No module named '([^']+)'", text):
        wanted = owners[-1] if owners else found[1]
        name = wanted.rpartition(".")[2]
        return (
            f"{key}: cannot import {wanted!r}: there is no module {found[1]!r} in this folder or among the installed"
            f" packages.{suggest(name, _class_names(keys[-1] if keys else ''))}"
        )
    if found := re.search(r"Import path (\S+) does not .* (\w+)$", text, re.M):
        return f"{key}: {found[1]} is not a {found[2]}"
    if found := re.search(r"the following arguments are required: (.+)", text):
        return _missing(found[1], owners)
    if found := re.search(r"invalid choice: '([^']+)' \(choose from (.+)\)", text):
        choices = re.findall(r"[\w-]+", found[2])
        return f"{found[1]!r} is not one of {', '.join(choices)}.{suggest(found[1], choices)}"
    if 'expected "subcommand"' in text:
        return f"a subcommand is needed: {_NEEDED['subcommand']}"
    return _wrong_type(message, keys, owners) or _shorten(text)


def _unknown_argument(name: str, class_path: str) -> str:
    known = constructor_arguments(class_path)
    wanted, _, _ = name.partition(".")
    short = class_path.rpartition(".")[2]
    if wanted not in known and (near := suggest(wanted, ["class_path", "init_args"])) and not suggest(wanted, known):
        return f"unknown key {wanted!r} beside class_path.{near}"
    takes = f" It takes: {', '.join(known)}" if known else ""
    return f"{short} has no argument {wanted!r}.{suggest(wanted, known)}{takes}"


def constructor_arguments(class_path: str) -> list[str]:
    """Names that a class may be given, through ``**kwargs`` also those of its bases."""
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    names: dict[str, None] = {}
    for base in inspect.getmro(cls):
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names.update({p.name: None for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)})
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name not in ("num_classes", "num_outputs")]  # the data's to say


def _parsers(parser: LightningArgumentParser) -> Iterator[LightningArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(choices := getattr(action, "_name_parser_map", None), Mapping):
            yield from choices.values()


def _unknown_option(name: str, parser: LightningArgumentParser, dashes: str) -> str:
    known: dict[str, None] = {}
    for each in _parsers(parser):
        for action in each._actions:
            for option in action.option_strings:
                if option.startswith("--") and not option.endswith(("+", ".help")):
                    known[option.removeprefix("--")] = None
    if not name.startswith("-") and dashes:
        return f"{name!r} is not understood: options are given as --name value"
    bare = name.lstrip("-")
    tops = {option.partition(".")[0] for option in known}
    top, dot, rest = bare.partition(".")
    if top in tops and dot:
        hint = suggest(dashes + bare, [dashes + option for option in known])
    else:
        near = suggest(top, tops)
        hint = re.sub(r"'(.*)'", rf"'{dashes}\1{dot}{rest}'" if dashes else r"'\1'", near)
        bare = bare if dashes else top
    return f"there is no {'option' if dashes else 'key'} {dashes + bare!r}.{hint}"


def _missing(names: str, owners: list[str]) -> str:
    if owners:
        return f"{owners[-1].rpartition('.')[2]} needs {names}"
    name = names.split(",")[0].strip().rpartition(".")[2]
    hint = f" ({_NEEDED[name]})" if name in _NEEDED else ""
    return f"--{name} is needed{hint}, or a config with -c FILE"


def _wrong_type(message: str, keys: list[str], owners: list[str]) -> str:
    """``'threshold' must be float, got 'high'``, or nothing where no type was refused."""
    if not keys:
        return ""
    inner = message[message.rindex(f'Parser key "{keys[-1]}"') :]
    value = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value|\n|$)", inner)
    inner = inner[: value.start()] if value else inner
    if recipe := re.search(r"Got value: Namespace\(class_path='([^']+)'", message):
        owners = [recipe[1]]
    owner = f"{owners[-1].rpartition('.')[2]}: " if owners else ""
    shown = keys[-1] if owners else ".".join(keys)
    if value and (literal := re.search(r"Expected an? (?:typing\.)?Literal\[(.*?)\]", inner)):
        choices = re.findall(r"'([^']*)'", literal[1])
        hint = suggest(value[1].strip("'"), choices)
        return f"{owner}{shown!r} must be {' or '.join(map(repr, choices))}, got {value[1]!r}.{hint}"
    types = re.findall(r"Expected an? (?:<class '([\w.]+)'>|(\w+))", inner)
    short = [(a or b).replace("NoneType", "null").rpartition(".")[2] for a, b in types]
    named = [name for name in dict.fromkeys(short) if name != "path"]
    if not named or value is None:
        return ""
    got = value[1] if len(value[1]) < 80 else value[1][:77] + "..."
    return f"{owner}{shown!r} must be {' or '.join(named)}, got {got!r}"


def _shorten(text: str) -> str:
    lines = [line.strip(" -") for line in text.splitlines()]
    dull = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Expected a path")
    kept = [line for line in lines if line and not line.startswith(dull)]
    joined = " ".join(dict.fromkeys(kept))
    return joined if len(joined) < 400 else joined[:397] + "..."


def _names_in(module: str) -> list[str]:
    return [name for name in dir(sys.modules.get(module)) if not name.startswith("_")]


def _subclasses(cls: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(cls)
    for child in children:
        yield child
        yield from _subclasses(child)


def _class_names(key: str) -> Iterable[str]:
    """Short names that may stand at a key: those of its kind where the key tells, else every class of this project."""
    import torch
    from lightning.pytorch import Callback

    from datamodules.base import Data
    from zoo.core.method import Method
    from zoo.core.network import Network

    kinds: dict[str, tuple[type, ...]] = {
        "model": (Method,),
        "data": (Data,),
        "network": (Network,),
        "callbacks": (Callback,),
        "optimizer": (torch.optim.Optimizer,),
        "scheduler": (torch.optim.lr_scheduler.LRScheduler,),
    }
    bases = kinds.get(key.rpartition(".")[2])
    if bases is not None:
        found: Iterable[type] = [cls for base in bases for cls in (base, *_subclasses(base))]
    else:
        modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in _PACKAGES]
        found = [item for module in modules for item in vars(module).values() if isinstance(item, type)]
    return sorted({cls.__name__ for cls in found if not cls.__name__.startswith("_")})
