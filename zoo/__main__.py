"""The front door: answers ``--help``, ``--version``, ``list`` and ``show`` without torch and hands on the rest."""

import importlib
import json
import os
import sys
from collections.abc import Sequence

from zoo import catalog
from zoo.core.errors import UserError, suggest

TRAINER = {
    "fit": "train a method on data",
    "validate": "score a checkpoint on the validation data",
    "test": "score a checkpoint on the test data",
    "predict": "write what a checkpoint predicts",
}
TOOLS = {
    "pipeline": "run several trainings as one YAML of stages",
    "benchmark": "time cases: processes side by side, medians and ratios",
    "export": "write a checkpoint as safetensors, ONNX or torch.export",
}
HERE = {
    "list": "the methods of the zoo",
    "show": "one method: its idea, arguments, configs and checkpoints",
}

HELP = """usage: zoo COMMAND [options]

Learning when labels are few, weak, or from somewhere else.

{commands}

Start here:
  zoo list
  zoo show FixMatch
  zoo fit -c configs/quickstart.yaml
  zoo test --ckpt_path runs/quickstart/checkpoints/best.ckpt

A run writes runs/NAME/: config.yaml, metrics.csv, checkpoints/{{last,best}}.ckpt. NAME is --name, or the stem of the
first config file; a name that is taken gets -2, -3, ...; nothing is overwritten.
"zoo COMMAND --help" lists options; "zoo fit --model.help FixMatch" those of a method.
ZOO_TRACEBACK=1 shows the full traceback of an error."""


def _help() -> str:
    commands = {**TRAINER, **HERE, **TOOLS}
    return HELP.format(commands="\n".join(f"  {name:<10} {text}" for name, text in commands.items()))


def _list(argv: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser("zoo list", description="The methods of the zoo.", allow_abbrev=False)
    parser.add_argument("--family", help="only this family: " + ", ".join(catalog.FAMILIES))
    parser.add_argument("--json", action="store_true", help="one JSON array, for programs")
    options = parser.parse_args(argv)
    if options.family is not None and options.family not in catalog.FAMILIES:
        raise UserError(
            f"zoo list: no family {options.family!r}.{suggest(options.family, catalog.FAMILIES)}"
            f" Families: {', '.join(catalog.FAMILIES)}"
        )
    entries = [entry for entry in catalog.methods().values() if options.family in (None, entry.family)]
    if options.json:
        keys = ("name", "title", "year", "paper", "family", "roles", "module", "summary")
        print(json.dumps([{key: getattr(entry, key) for key in keys} for entry in entries], indent=2))  # noqa: T201
        return 0
    rows = [(entry.name, str(entry.year), entry.paper, ", ".join(entry.roles), entry.summary) for entry in entries]
    header = ("method", "year", "paper", "roles", "idea")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(4)]
    family = None
    for entry, row in zip(entries, rows, strict=True):
        if entry.family != family:
            family = entry.family
            print(f"\n{family.replace('_', ' ')}")  # noqa: T201
        print("  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))  # noqa: T201
    print(f"\n{len(entries)} methods. zoo show NAME tells more.")  # noqa: T201
    return 0


def _show(argv: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser("zoo show", description="One method of the zoo.", allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", help="a method, as zoo list names it")
    name = parser.parse_args(argv).name
    name = name.removeprefix("zoo.")
    known = catalog.methods()
    if name not in known:
        raise UserError(f"zoo show: no method {name!r}.{suggest(name, known)} zoo list names them all")
    entry = known[name]
    lines = [f"zoo.{entry.name}: {entry.title} ({entry.year}{', ' + entry.paper if entry.paper else ''})"]
    lines += [f"family: {entry.family}   batch roles: {', '.join(entry.roles)}   source: {_relative(entry.path)}", ""]
    lines += [entry.docstring, "", "arguments (default; the class that declares it):"]
    for argument in catalog.arguments(entry):
        default = "required" if argument.default is None else f"= {argument.default}"
        if argument.name == "num_classes":
            default = "from the data"
        lines.append(f"  {argument.name}: {argument.annotation} {default}  [{argument.owner}]")
    for title, paths in (("configs", catalog.configs(name)), ("checkpoints", catalog.checkpoints(name))):
        lines += ["", f"{title}:", *([f"  {_relative(path)}" for path in paths] or ["  none"])]
    print("\n".join(lines))  # noqa: T201
    return 0


def _relative(path: os.PathLike[str]) -> str:
    shown = os.path.relpath(path)
    return os.fspath(path) if shown.startswith("..") else shown


def _leave_group() -> None:
    """Hang up on the other ranks before the interpreter ends: what is still connected then may keep it from ending."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``zoo`` command.

    Args:
        argv: the arguments after ``zoo``; None takes those of the process.

    Returns:
        The exit status: 0, or 2 for something the user can mend.
    """
    of_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    try:
        if command in ("--help", "-h", "help"):
            print(_help())  # noqa: T201
            return 0
        if command in ("--version", "-V", "version"):
            from zoo import __version__

            print(f"labelight {__version__}")  # noqa: T201
            return 0
        if command == "list":
            return _list(rest)
        if command == "show":
            return _show(rest)
        if command in TRAINER:
            status = int(importlib.import_module("zoo.cli").main(argv) or 0)
            if of_process:
                _leave_group()
            return status
        if command in TOOLS:
            return int(importlib.import_module(f"zoo.{command}").main(rest) or 0)
        commands = [*TRAINER, *HERE, *TOOLS]
        raise UserError(f"no command {command!r}.{suggest(command, commands)} Commands: {', '.join(commands)}")
    except UserError as error:
        if os.environ.get("ZOO_TRACEBACK") == "1":
            raise
        print(f"zoo: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except BrokenPipeError:  # `zoo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
