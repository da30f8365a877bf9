"""Several trainings as one file: stages that name each other's outputs, and the comparison that the paper makes.

A pipeline is one YAML file. Every stage is an ordinary command line run; what it leaves behind can be named by
the stages after it::

    metric: test/accuracy              # what a stage's bare name means in the summary
    seeds: [0, 1, 2]                   # the whole pipeline, once per seed
    stages:
      teacher:
        command: fit
        config: [configs/supervised/digits.yaml]
      scores:
        command: test
        config: [configs/supervised/digits.yaml]
        overrides: {ckpt_path: "${teacher.checkpoint}"}
    summary:
      error: 1 - scores

A stage offers ``${stage.run}`` (its folder), ``${stage.checkpoint}`` (the best, otherwise the last one),
``${stage.predictions}`` (the tensors, if it wrote a table as well) and ``${stage.metrics[test/accuracy]}``; ``${seed}``
is the seed of this round. A finished stage is run again only when its command, its configs, its overrides or the
contents of what it takes from other stages have changed.

A summary is arithmetic over stages, with ``min``, ``max``, ``abs``, ``sqrt`` and ``ratio(part, whole)``, which is
undefined, and said to be, where the whole is not positive.

Shares of a gap over seeds, as a ratio of means with its interval, are said apart, once for all students and for the
controls without which a share says little::

    gap_recovered:
      four_pixels:
        weak: weak                     # a stage, or arithmetic over stages
        ceiling: ceiling
        students: [naive, confidence]
        controls: [permuted, uniform]
        metrics: {test/accuracy: higher, test/auroc: higher}   # by default the pipeline's, of which more is better
        min_gap: 0.01                  # below it, or below twice its standard error, a share is undefined
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import math
import operator
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zoo.core.errors import UserError, suggest
from zoo.gap_table import GapTable
from zoo.stage_runners import Runner, fastest

__all__ = ["Pipeline", "PipelineError", "Stage", "StageFailedError", "evaluate", "main", "run"]

COMMANDS = ("fit", "validate", "test", "predict")
OUTPUTS = ("run", "checkpoint", "predictions", "metrics")
_RUN_KEYS = ("trainer", "model", "data", "seed_everything", "ckpt_path", "optimizer", "lr_scheduler")
_PIPELINE_KEYS = ("name", "description", "root", "seeds", "metric", "overrides", "stages", "summary", "gap_recovered")
_STAGE_KEYS = ("command", "config", "overrides")
_RESERVED = ("seed", "overrides", *_RUN_KEYS, "min", "max", "abs", "sqrt", "ratio")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_TARGET = re.compile(r"(?P<stage>\w+)(?:\.(?P<output>\w+)(?:\[(?P<metric>[^\]]+)\])?)?\Z")


class PipelineError(UserError):
    """The pipeline file, or what was asked of it, is wrong; nothing has been run."""


class StageFailedError(RuntimeError):
    """A stage ended with an error, or without an output that another stage needs."""


@dataclass(frozen=True)
class Stage:
    """One command line run.

    Args:
        name: how other stages and the summary call it.
        command: one of ``fit``, ``validate``, ``test``, ``predict``.
        config: configuration files, later ones win.
        overrides: dotted key → value, applied after the files. May hold ``${...}`` references.
    """

    name: str
    command: str
    config: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def references(self) -> list[tuple[str, str, str | None]]:
        """Everything named in configs and overrides: (stage, output, metric)."""
        return [_target(text, self.name) for text in _named([*self.config, self.overrides])]

    def needs(self) -> list[str]:
        """Names of the stages that must be finished first, without repeats."""
        return list(dict.fromkeys(stage for stage, _, _ in self.references() if stage != "seed"))


@dataclass(frozen=True)
class Pipeline:
    """Stages in an order in which they can run, and the summary over them.

    Args:
        name: of the pipeline; the run folder is ``root``.
        stages: name → stage, each after the stages it needs.
        root: folder of all its runs.
        seeds: the rounds; empty for one round with the configs' own seeds.
        metric: what a stage's bare name means in ``summary``.
        summary: name → expression.
        gaps: name → the shares of a gap that students and controls recover.
    """

    name: str
    stages: Mapping[str, Stage]
    root: Path
    seeds: tuple[int, ...] = ()
    metric: str = "test/accuracy"
    summary: Mapping[str, str] = field(default_factory=dict)
    gaps: Mapping[str, GapTable] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, changes: Sequence[str] = ()) -> Pipeline:
        """Reads and checks a file; nothing is run.

        Args:
            path: YAML file.
            changes: ``KEY=VALUE`` strings. KEY is ``STAGE.dotted.key`` (an override of one stage), a run key such as
                ``trainer.max_epochs`` (an override of every stage), or ``seeds``, ``root``, ``metric``.

        Raises:
            PipelineError: naming what is wrong and the nearest right name.
        """
        content = _mapping(_read_yaml(Path(path)), str(path))
        _known(content, _PIPELINE_KEYS, str(path))
        described = _mapping(content.get("stages"), f"{path}: stages")
        if not described:
            raise PipelineError(f"{path}: stages is empty; a pipeline needs at least one stage")
        common = _flatten(_mapping(content.get("overrides") or {}, f"{path}: overrides"))
        own: dict[str, dict[str, Any]] = {}
        for name, body in described.items():
            body = _mapping(body, f"{path}: stages.{name}")
            _known(body, _STAGE_KEYS, f"{path}: stages.{name}")
            own[name] = _flatten(_mapping(body.get("overrides") or {}, f"{path}: stages.{name}.overrides"))
        for change in changes:
            _apply_change(change, content, common, own)
        stages = {name: _stage(name, body, common | own[name], str(path)) for name, body in described.items()}
        pipeline = cls(
            name=str(content.get("name") or Path(path).stem),
            stages=_in_order(stages),
            root=Path(content.get("root") or Path("runs") / str(content.get("name") or Path(path).stem)),
            seeds=_seeds(content.get("seeds"), str(path)),
            metric=str(content.get("metric", "test/accuracy")),
            summary={str(k): _expression(v) for k, v in _mapping(content.get("summary") or {}, "summary").items()},
            gaps={
                name: _gap(name, body, str(content.get("metric", "test/accuracy")))
                for name, body in _mapping(content.get("gap_recovered") or {}, "gap_recovered").items()
            },
        )
        pipeline._check_summary()
        return pipeline

    def _check_summary(self) -> None:
        known = [*self.stages]
        for name, expression in self.summary.items():
            if name in self.stages or not name.isidentifier():
                reason = "is a stage's name" if name in self.stages else "is not a plain name"
                raise PipelineError(f"summary.{name}: {name!r} {reason}; choose another")
            for used in _names(expression, f"summary.{name}"):
                if used not in known:
                    raise PipelineError(
                        f"summary.{name}: unknown stage or earlier expression {used!r}.{suggest(used, known)}"
                    )
            known.append(name)
        for name, gap in self.gaps.items():
            where = f"gap_recovered.{name}"
            for used in [used for text in gap.expressions() for used in _names(text, where)]:
                if used not in self.stages:
                    raise PipelineError(f"{where}: unknown stage {used!r}.{suggest(used, [*self.stages])}")

    def folder(self, stage: str, seed: int | None) -> Path:
        """The run folder of a stage in one round."""
        return self.root / stage if seed is None else self.root / f"seed_{seed}" / stage


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        here = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise PipelineError(f"there is no file {path}.{suggest(path.name, here)}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise PipelineError(f"{path} cannot be read as YAML: {error}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PipelineError(f"{where} must be a mapping, got {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


def _known(mapping: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in mapping:
        if key not in allowed:
            raise PipelineError(f"{where}: unknown key {key!r}.{suggest(key, allowed)} Allowed: {', '.join(allowed)}")


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{a: {b: 1}}`` → ``{"a.b": 1}``; a description of a class stays whole."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _apply_change(
    change: str, content: dict[str, Any], common: dict[str, Any], own: Mapping[str, dict[str, Any]]
) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise PipelineError(f"--set {change!r}: expected KEY=VALUE")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PipelineError(f"--set {change!r}: the value is not YAML: {error}") from None
    first, _, rest = key.partition(".")
    if first in own and rest:
        own[first][rest] = value
    elif first in _RUN_KEYS:
        common[key] = value
        for overrides in own.values():  # what is typed wins over what the file says
            overrides.pop(key, None)
    elif key in ("seeds", "root", "metric", "name"):
        content[key] = value
    else:
        choices = [*own, *_RUN_KEYS, "seeds", "root", "metric", "name"]
        raise PipelineError(f"--set {change!r}: {first!r} is neither a stage nor a run key.{suggest(first, choices)}")


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = [] if value is None else [value] if isinstance(value, int) else value
    right = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not right or len(set(seeds)) != len(seeds):
        raise PipelineError(f"{where}: seeds={value!r} must be a list of different integers, 0 or above")
    return tuple(seeds)


def _stage(name: str, body: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Stage:
    if not name.isidentifier() or name in _RESERVED:
        raise PipelineError(f"{where}: a stage cannot be called {name!r}: use letters, digits, _ and no reserved name")
    command = body.get("command", "fit")
    if command not in COMMANDS:
        raise PipelineError(
            f"{where}: stages.{name}.command={command!r} must be one of {', '.join(COMMANDS)}."
            f"{suggest(str(command), COMMANDS)}"
        )
    config = body.get("config") or []
    config = [config] if isinstance(config, str) else config
    if not isinstance(config, list) or not all(isinstance(item, str) for item in config):
        raise PipelineError(f"{where}: stages.{name}.config must be a file or a list of files, got {config!r}")
    for item in config:
        if "${" not in item and not Path(item).is_file():
            beside = [str(p) for p in Path(item).parent.glob("*.yaml")] if Path(item).parent.is_dir() else []
            raise PipelineError(f"{where}: stages.{name}.config: there is no file {item!r}.{suggest(item, beside)}")
    return Stage(name, command, tuple(config), dict(overrides))


def _gap(name: str, body: Any, metric: str) -> GapTable:
    where = f"gap_recovered.{name}"
    described = _mapping(body, where)
    _known(described, GapTable.KEYS, where)
    for key in ("weak", "ceiling"):
        described[key] = _expression(described.get(key, ""))
    try:
        return GapTable.read(described, metric)
    except ValueError as error:
        raise PipelineError(f"{where}: {error}") from None


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from _REFERENCE.findall(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _named(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _named(item)


def _target(text: str, where: str) -> tuple[str, str, str | None]:
    match = _TARGET.match(text.strip())
    if match is None or (match["output"] is None and match["stage"] != "seed"):
        raise PipelineError(
            f"stage {where!r}: '${{{text}}}' is not a reference; write ${{stage.run}}, ${{stage.checkpoint}}, "
            "${stage.predictions}, ${stage.metrics[name]} or ${seed}"
        )
    if match["stage"] == "seed":
        return "seed", "seed", None
    output, metric = match["output"], match["metric"]
    if output not in OUTPUTS:
        raise PipelineError(f"stage {where!r}: '${{{text}}}': unknown output {output!r}.{suggest(output, OUTPUTS)}")
    if (output == "metrics") != (metric is not None):
        raise PipelineError(f"stage {where!r}: '${{{text}}}': write ${{{match['stage']}.metrics[test/accuracy]}}")
    return match["stage"], output, metric


def _in_order(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """Depth first, in the file's order: every stage after what it needs."""
    ordered: dict[str, Stage] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise PipelineError(f"stages need each other in a circle: {' → '.join([*path[path.index(name) :], name])}")
        if name in ordered:
            return
        for needed in stages[name].needs():
            if needed not in stages:
                raise PipelineError(f"stage {name!r} names an unknown stage {needed!r}.{suggest(needed, [*stages])}")
            visit(needed, (*path, name))
        ordered[name] = stages[name]

    for name in stages:
        visit(name, ())
    return ordered


# --- the summary -----------------------------------------------------------------------------------------------------

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}


def _ratio(part: float, whole: float) -> float:
    """A share of something that must be there: a recovered share of no gap, or of a negative one, says nothing."""
    if not whole > 0:
        raise ValueError("the whole is not positive")
    return part / whole


_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs, "sqrt": math.sqrt, "ratio": _ratio}
_ARGUMENTS = {"abs": 1, "sqrt": 1, "ratio": 2}  # the others take any number
_LONGEST_EXPRESSION = 1000  # characters; the parser recurses


def _expression(value: Any) -> str:
    """``${student.metrics[test/loss]}`` may be written in a summary too: it becomes ``student['test/loss']``."""
    return re.sub(r"\$\{(\w+)\.metrics\[([^\]]+)\]\}", r"\1['\2']", str(value))


def _parse(expression: str, where: str) -> ast.expr:
    if len(expression) > _LONGEST_EXPRESSION:
        raise PipelineError(f"{where}: longer than {_LONGEST_EXPRESSION} characters")
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise PipelineError(f"{where}: {expression!r} is not arithmetic: {error}") from None


def _names(expression: str, where: str) -> list[str]:
    """Names used; raises on anything but numbers, names, ``stage['metric']``, arithmetic and a few functions."""
    found: list[str] = []

    def walk(node: ast.expr) -> None:
        match node:
            case ast.Constant(value=bool()):
                pass
            case ast.Constant(value=int() | float()):
                return
            case ast.Name(id=name):
                found.append(name)
                return
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str())):
                found.append(name)
                return
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                walk(left)
                walk(right)
                return
            case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
                walk(operand)
                return
            case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in _FUNCTIONS:
                if len(arguments) != _ARGUMENTS.get(name, len(arguments)):
                    raise PipelineError(
                        f"{where}: {ast.unparse(node)!r}: {name} takes {_ARGUMENTS[name]}, not {len(arguments)}"
                    )
                for argument in arguments:
                    walk(argument)
                return
        raise PipelineError(
            f"{where}: {ast.unparse(node)!r} is not allowed; a summary is arithmetic (+ - * / **, "
            f"{', '.join(_FUNCTIONS)}) over stages and stage['metric']"
        )

    walk(_parse(expression, where))
    return list(dict.fromkeys(found))


def evaluate(expression: str, lookup: Callable[[str, str | None], float]) -> tuple[float, str]:
    """Evaluates arithmetic over metrics without Python's ``eval``.

    Args:
        expression: e.g. ``(student - weak) / (ceiling - weak)`` or ``student['test/loss']``.
        lookup: (name, metric or None for the default one) → value; a ``KeyError`` says why there is none.

    Returns:
        (value, ""), or (NaN, why it is undefined).

    Raises:
        PipelineError: the expression is not plain arithmetic.
    """
    _names(expression, "summary")

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=number):
                return float(number)  # type: ignore[arg-type]  # floats: a tower of powers overflows, it does not hang
            case ast.Name(id=name):
                return float(lookup(name, None))
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=metric)):
                return float(lookup(name, str(metric)))
            case ast.BinOp(left=left, op=op, right=right):
                result = _BINARY[type(op)](value(left), value(right))
                if isinstance(result, complex):
                    raise ValueError("a root of a negative number")
                return float(result)
            case ast.UnaryOp(op=sign, operand=operand):
                return float(_UNARY[type(sign)](value(operand)))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                numbers = [value(argument) for argument in arguments]
                return float(numbers[0] if len(numbers) == 1 and name not in _ARGUMENTS else _FUNCTIONS[name](*numbers))
        raise AssertionError(ast.dump(node))  # _names has let nothing else through

    try:
        result = value(_parse(expression, "summary"))
    except ZeroDivisionError:
        return math.nan, "division by zero"
    except KeyError as error:
        return math.nan, str(error.args[0])
    except (OverflowError, ValueError, TypeError) as error:
        return math.nan, str(error)
    return (result, "") if math.isfinite(result) else (math.nan, "not a finite number")


# --- running ---------------------------------------------------------------------------------------------------------


def _digest_file(path: Path) -> str:
    if path.is_dir():  # a sharded checkpoint, a folder of predictions
        parts = [[str(p.relative_to(path)), _digest_file(p)] for p in sorted(path.rglob("*")) if p.is_file()]
        return _digest(parts)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _outputs(folder: Path) -> dict[str, Any]:
    """What a finished run left behind, with a digest of each."""
    outputs: dict[str, Any] = {"run": str(folder), "metrics": _metrics(folder)}
    for name in ("best", "last"):
        candidate = folder / "checkpoints" / f"{name}.ckpt"
        if candidate.exists():
            outputs["checkpoint"] = str(candidate)
            break
    found = sorted(folder.glob("predictions*"), key=lambda path: (path.suffix != ".safetensors", path))
    if found:  # tensors for programs go before the table for people
        outputs["predictions"] = str(found[0])
    files = [name for name in ("checkpoint", "predictions") if name in outputs]
    digests: dict[str, str] = {name: _digest_file(Path(outputs[name])) for name in files}
    digests["run"] = _digest([digests, outputs["metrics"]])
    return {**outputs, "digests": digests}


def _metrics(folder: Path) -> dict[str, float]:
    try:
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StageFailedError(f"{folder / 'metrics.json'} is not JSON: {error}") from None
    nested = content.get("metrics") if isinstance(content, dict) else None
    values = nested if isinstance(nested, dict) else content if isinstance(content, dict) else {}
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _write_json(path: Path, content: Any) -> None:
    """Written beside and moved into place: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def _still_there(outputs: Mapping[str, Any]) -> bool:
    return all(Path(outputs[name]).exists() for name in ("run", "checkpoint", "predictions") if name in outputs)


def _resolve(value: Any, replace: Callable[[str], Any]) -> Any:
    """References in any string, at any depth; a string that is one reference keeps the value's own type."""
    if isinstance(value, str):
        whole = _REFERENCE.fullmatch(value.strip())
        return replace(whole[1]) if whole else _REFERENCE.sub(lambda match: str(replace(match[1])), value)
    if isinstance(value, Mapping):
        return {key: _resolve(item, replace) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolve(item, replace) for item in value]
    return value


def _value_of(reference: str, where: str, outputs: Mapping[str, Mapping[str, Any]], seed: int | None) -> Any:
    stage, output, metric = _target(reference, where)
    if stage == "seed":
        return 0 if seed is None else seed
    offered = outputs[stage]
    if metric is not None:
        if metric not in offered["metrics"]:
            raise StageFailedError(
                f"stage {where!r} needs '{metric}' of stage {stage!r}, whose metrics.json has "
                f"{', '.join(offered['metrics']) or 'nothing'}.{suggest(metric, [*offered['metrics']])}"
            )
        return offered["metrics"][metric]
    if output not in offered:
        raise StageFailedError(
            f"stage {where!r} needs the {output} of stage {stage!r}, which left none in {offered['run']}"
        )
    return offered[output]


def _argument(key: str, value: Any) -> str:
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def _command(stage: Stage, folder: Path, seed: int | None, replace: Callable[[str], Any]) -> list[str]:
    command = [sys.executable, "-m", "zoo", stage.command]
    for item in stage.config:
        command += ["--config", str(_resolve(item, replace))]
    overrides = _resolve(dict(stage.overrides), replace)
    if seed is not None:
        overrides.setdefault("seed_everything", seed)
    overrides["trainer.default_root_dir"] = str(folder)
    return command + [_argument(key, value) for key, value in overrides.items()]


def _key(stage: Stage, seed: int | None, outputs: Mapping[str, Mapping[str, Any]]) -> str:
    """What the result depends on: contents instead of paths, so that a moved folder changes nothing."""

    def content(reference: str) -> Any:
        name, output, metric = _target(reference, stage.name)
        if name == "seed" or metric is not None:
            return _value_of(reference, stage.name, outputs, seed)
        _value_of(reference, stage.name, outputs, seed)
        return outputs[name]["digests"][output]

    def value(reference: str) -> Any:
        return _value_of(reference, stage.name, outputs, seed)

    configs = [_read_yaml(Path(str(_resolve(item, value)))) for item in stage.config]
    return _digest([stage.command, configs, _resolve(dict(stage.overrides), content), seed])


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Two pipelines in one folder would clear each other's runs."""
    root.mkdir(parents=True, exist_ok=True)
    handle: IO[str] = (root / ".lock").open("w")
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such locks on this system
        pass
    except BlockingIOError:
        handle.close()
        raise PipelineError(f"another pipeline is running in {root}") from None
    try:
        yield
    finally:
        handle.close()


def _fresh(folder: Path, name: str) -> None:
    """An empty run folder; only what an earlier run of this stage left is ever removed."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "stage.json").is_file():
            raise StageFailedError(
                f"stage {name!r}: {folder} holds files that no pipeline wrote; move them or choose another root"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _tail(path: Path, lines: int = 30) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def run(
    pipeline: Pipeline,
    runner: Runner | None = None,
    force: Sequence[str] = (),
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs what is not finished yet, then writes and prints the summary.

    Args:
        pipeline: as read by :meth:`Pipeline.read`.
        runner: runs one command line; by default each in a process of its own.
        force: stages to run even if nothing has changed.
        dry_run: only print the command lines and whether each would run.
        console: where to print.

    Returns:
        The content of ``summary.json``; empty for a dry run.

    Raises:
        PipelineError: ``force`` names no stage, or another pipeline uses the folder.
        StageFailedError: a stage failed; later stages have not been run, finished ones are kept.
    """
    console = console or Console()
    for name in force:
        if name not in pipeline.stages:
            raise PipelineError(f"--force {name}: unknown stage.{suggest(name, [*pipeline.stages])}")
    rounds: Sequence[int | None] = pipeline.seeds or (None,)
    if dry_run:
        for seed in rounds:
            _show_plan(pipeline, seed, force, console)
        return {}
    with _only_one(pipeline.root):
        chosen = cache(fastest if runner is None else lambda: runner)  # what it imports is not needed if all is kept
        results = {seed: _run_round(pipeline, seed, chosen, force, console) for seed in rounds}
        summary = _summarize(pipeline, results)
        _write_json(pipeline.root / "summary.json", summary)
    _print_summary(pipeline, summary, console)
    return summary


def _show_plan(pipeline: Pipeline, seed: int | None, force: Sequence[str], console: Console) -> None:
    outputs: dict[str, Mapping[str, Any]] = {}
    for stage in pipeline.stages.values():
        folder = pipeline.folder(stage.name, seed)
        known = all(needed in outputs for needed in stage.needs())
        record = _read_record(folder) if known and stage.name not in force else {}
        done = (
            record.get("status") == "finished"
            and _still_there(record["outputs"])
            and record.get("key") == _key(stage, seed, outputs)
        )
        if done:
            outputs[stage.name] = record["outputs"]

        def replace(reference: str, where: str = stage.name) -> Any:
            named = _target(reference, where)[0]
            ready = named == "seed" or named in outputs
            return _value_of(reference, where, outputs, seed) if ready else f"${{{reference}}}"

        label = f"{stage.name}" if seed is None else f"{stage.name} (seed {seed})"
        console.print(f"[bold]{escape(label)}[/]: {'finished, kept' if done else 'would run'}")
        console.print("  " + " ".join(_command(stage, folder, seed, replace)), markup=False, soft_wrap=True)


def _run_round(
    pipeline: Pipeline, seed: int | None, runner: Callable[[], Runner], force: Sequence[str], console: Console
) -> dict[str, Mapping[str, Any]]:
    outputs: dict[str, Mapping[str, Any]] = {}
    for stage in pipeline.stages.values():
        folder = pipeline.folder(stage.name, seed)
        label = stage.name if seed is None else f"{stage.name} (seed {seed})"
        key = _key(stage, seed, outputs)
        record = _read_record(folder)
        finished = record.get("status") == "finished" and record.get("key") == key
        if finished and stage.name not in force and _still_there(record["outputs"]):
            console.print(f"{escape(label)}: finished, kept")
            outputs[stage.name] = record["outputs"]
            continue
        command = _command(stage, folder, seed, partial(_value_of, where=stage.name, outputs=outputs, seed=seed))
        _fresh(folder, stage.name)
        _write_json(folder / "stage.json", {"status": "running", "key": key, "command": command})
        console.print(f"{escape(label)}: running → {escape(str(folder))}")
        started = time.monotonic()
        status = runner()(command, folder)
        seconds = round(time.monotonic() - started, 1)
        if status != 0:
            _write_json(folder / "stage.json", {"status": "failed", "key": key, "command": command, "exit": status})
            log = folder / "log.txt"
            raise StageFailedError(
                f"stage {label!r} failed with exit status {status} after {seconds} s. "
                f"Its log {log} ends with:\n{_tail(log)}"
            )
        outputs[stage.name] = _outputs(folder)
        _write_json(
            folder / "stage.json",
            {"status": "finished", "key": key, "command": command, "seconds": seconds, "outputs": outputs[stage.name]},
        )
    return outputs


def _summarize(pipeline: Pipeline, results: Mapping[int | None, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    rows: dict[str, list[tuple[float, str]]] = {name: [] for name in [*pipeline.stages, *pipeline.summary]}
    gaps: dict[str, list[dict[str, dict[str, tuple[float, str]]]]] = {name: [] for name in pipeline.gaps}
    for outputs in results.values():
        values: dict[str, tuple[float, str]] = {}

        def lookup(
            name: str,
            metric: str | None,
            outputs: Mapping[str, Mapping[str, Any]] = outputs,
            values: dict[str, tuple[float, str]] = values,
        ) -> float:
            if name in outputs:
                wanted = metric or pipeline.metric
                offered = outputs[name]["metrics"]
                if wanted not in offered:
                    raise KeyError(f"stage {name!r} reported no {wanted!r}, only {', '.join(offered) or 'nothing'}")
                return float(offered[wanted])
            if values[name][1]:
                raise KeyError(f"{name}: {values[name][1]}")
            return values[name][0]

        for name in pipeline.stages:
            values[name] = evaluate(name, lookup)
        for name, expression in pipeline.summary.items():
            values[name] = evaluate(expression, lookup)
        for name, pair in values.items():
            rows[name].append(pair)
        for name, gap in pipeline.gaps.items():
            gaps[name].append(gap.scores(evaluate, lookup))
    summary: dict[str, Any] = {"name": pipeline.name, "metric": pipeline.metric, "seeds": [*pipeline.seeds]}
    summary["stages"] = {
        name: _row(rows[name], pipeline.seeds) for name in pipeline.stages if any(not why for _, why in rows[name])
    }
    summary["summary"] = {name: _row(rows[name], pipeline.seeds) for name in pipeline.summary}
    for name, expression in pipeline.summary.items():
        summary["summary"][name]["expression"] = expression
    summary["gap_recovered"] = {name: gap.recovered(gaps[name]) for name, gap in pipeline.gaps.items()}
    summary["metrics"] = [
        {"seed": seed, **{name: dict(output["metrics"]) for name, output in outputs.items()}}
        for seed, outputs in results.items()
    ]
    return summary


def _row(pairs: Sequence[tuple[float, str]], seeds: Sequence[int]) -> dict[str, Any]:
    """Mean and sample deviation over the rounds where the value is defined; JSON has no NaN, so null stands for it."""
    defined = [value for value, why in pairs if not why]
    places = [f"seed {seed}" for seed in seeds] or ["this run"]
    return {
        "values": [None if why else value for value, why in pairs],
        "mean": statistics.fmean(defined) if defined else None,
        "std": statistics.stdev(defined) if len(defined) > 1 else None,
        "count": len(defined),
        "undefined": {place: why for place, (_, why) in zip(places, pairs, strict=True) if why},
    }


def _print_summary(pipeline: Pipeline, summary: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"{pipeline.name}: {pipeline.metric}")
    for heading in ("", "mean ± std", "n", "expression"):
        table.add_column(heading, justify="left" if heading in ("", "expression") else "right")
    notes: list[str] = []
    for section in ("stages", "summary"):
        for name, row in summary[section].items():
            flag = " *" if row["undefined"] else ""
            mean = "NaN" if row["mean"] is None else f"{row['mean']:.4f}"
            spread = "" if row["std"] is None else f" ± {row['std']:.4f}"
            table.add_row(name, f"{mean}{spread}{flag}", str(row["count"]), escape(row.get("expression", "")))
            notes += [f"* {name} is undefined for {place}: {why}" for place, why in row["undefined"].items()]
        table.add_section()
    console.print(table)
    for note in notes:
        console.print(note, markup=False)
    for name, gap in pipeline.gaps.items():
        gap.show(f"{pipeline.name}: gap recovered, {name}", summary["gap_recovered"][name], console)
    console.print(f"written to {pipeline.root / 'summary.json'}", markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """``zoo pipeline FILE [--dry_run] [--force STAGE] [--set KEY=VALUE]``.

    Returns:
        0; leaves with exit status 1 after a failed stage, 130 when interrupted.

    Raises:
        PipelineError: for a mistake in the file or the arguments, before anything runs; ``zoo`` exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="zoo pipeline", description="Run the stages of a pipeline file.", allow_abbrev=False
    )
    parser.add_argument("file", help="a YAML file of stages, e.g. configs/pipelines/teacher_student.yaml")
    parser.add_argument("--dry_run", action="store_true", help="print the command lines, run nothing")
    parser.add_argument("--force", action="append", default=[], metavar="STAGE", help="run this stage again")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="STAGE.key, trainer.key, seeds")
    arguments = parser.parse_args(argv)
    errors = Console(stderr=True)
    pipeline = Pipeline.read(arguments.file, arguments.set)
    try:
        run(pipeline, force=arguments.force, dry_run=arguments.dry_run)
    except StageFailedError as error:
        errors.print(f"zoo pipeline: {error}", markup=False, soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        errors.print("zoo pipeline: interrupted; run it again to go on at the unfinished stage", markup=False)
        raise SystemExit(130) from None
    return 0
