"""The command line of training: Lightning's own, with names instead of paths and one-line errors.

``fit validate test predict`` are the subcommands of :class:`ZooCLI`; :func:`main` is what the front door calls.
"""

import importlib
import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import callbacks
import zoo
from callbacks.transfer_validation import sees_target
from datamodules.base import Data
from datamodules.domains import DomainData
from zoo import catalog, run_folder
from zoo.core.checkpoint_io import AtomicCheckpointIO, RunCheckpoint
from zoo.core.errors import UserError, suggest
from zoo.core.method import Method
from zoo.parser import Parser, flatten

SUBCOMMANDS = ("fit", "validate", "test", "predict")
DEFAULT_CALLBACKS = (
    "EMATeacher",
    "KeepFreedMemory",
    "Throughput",
    "PseudoLabelDiagnostics",
    "RunSummary",
    "NonFiniteGuard",
)

# Advice that does not apply here: frozen teachers are in eval mode on purpose, sets in memory need no workers, and runs
# may be shorter than the logging interval.
_NOISE = (
    r"Found \d+ module\(s\) in eval mode",
    r".*does not have many workers",
    r".*number of training batches .* smaller than the logging interval",
    r".*exists and is not empty",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*Tip: .*litlogger",
    r".*callbacks used to create the checkpoint need to be provided",
    r".*It is recommended to use `self.log\(.*sync_dist=True\)`",
)


class _Stage(Callback):
    """Remembers whether a loop has begun: errors before are the user's to mend, errors after keep their traceback."""

    def __init__(self) -> None:
        self.started = False

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _start


class _Bar(TQDMProgressBar):
    """Lightning's bar without the version number."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items  # type: ignore[return-value]


class ZooCLI(LightningCLI):
    """LightningCLI for methods and data of this package.

    Args:
        args: the command line.
        stage: told when a loop begins.
    """

    def __init__(self, args: Sequence[str], stage: _Stage | None = None) -> None:
        self.stage = stage or _Stage()
        self.typed = list(args)
        self.folder: Path | None = None
        self._checkpoint_classes: int | None = None
        super().__init__(
            Method,
            Data,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={"prog": "zoo", **{name: {"allow_abbrev": False} for name in SUBCOMMANDS}},
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=self.typed,
        )

    # --- parsing ------------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The name of the run, and the number of classes said once, by the data."""
        parser.add_argument("--name", type=str | None, default=None, help="Run folder under runs/; the config's stem.")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            parser.add_argument("--untrained", type=bool, default=False, help="Allow a model without --ckpt_path.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given, whatever ``sys.argv`` holds."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        if not config.get("ckpt_path"):
            if subcommand != "fit" and not config.get("untrained") and not _has_weights(config):
                raise UserError(_no_checkpoint(subcommand))
            return
        path = run_folder.existing_checkpoint(str(config.ckpt_path))
        recorded = read_hyperparameters(path)
        self._checkpoint_classes = recorded.pop("num_classes", None)
        recorded.pop("_instantiator", None)
        class_path = recorded.pop("_class_path", None)
        if class_path is None:
            return  # built in Python from something that has no import path: the config describes it
        typed = self._typed_values(subcommand)
        before = flatten(typed)
        config.pop("model", None)
        if subcommand != "fit":
            recorded |= typed_for_tests(class_path, recorded, typed)
        model = {"class_path": class_path, "init_args": recorded}
        self.config = self.parser.parse_object({subcommand: {"model": model}}, self.config)
        after = flatten(self.config[subcommand].model)
        verb = "resuming; a new run takes them from its own config" if subcommand == "fit" else subcommand
        for key, value in before.items():
            now = after.get(key)
            if value == now or (key.endswith("weights") and now is None) or key.endswith("num_classes"):
                continue
            if key == "class_path":
                if str(value).rpartition(".")[2] == str(now).rpartition(".")[2]:
                    continue
                shown = "model"
            else:
                shown = "model." + key.replace("init_args.", "")
            _say(f"{shown}: typed {value}, checkpoint says {now} (the checkpoint wins for {verb})")

    def _typed_values(self, subcommand: str) -> Any:
        """What the command line and its configs say about the model, without defaults."""
        try:
            return self.parser.parse_args(self.typed, defaults=False)[subcommand].get("model") or Namespace()
        except (SystemExit, KeyError, UserError):
            return Namespace()

    # --- the run folder -----------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and check that it can be written, before anything costs time."""
        config = self.config[self.subcommand]
        given, checkpoint = config.trainer.default_root_dir, config.get("ckpt_path")
        config["name"] = config.get("name") or self._derived_name(config)
        if given is not None:
            self.folder = Path(given)
            if self.subcommand == "fit" and not checkpoint and any(self.folder.glob("checkpoints/*.ckpt")):
                raise UserError(
                    f"trainer.default_root_dir={given} already holds a run. Resume it with --ckpt_path "
                    f"{self.folder / 'checkpoints' / 'last.ckpt'}, or give another folder"
                )
        elif checkpoint:
            self.folder = catalog.run_folder(checkpoint)
        elif config.trainer.fast_dev_run:
            return
        elif self.subcommand == "fit":
            self.folder = run_folder.claim(config.name)
        else:
            self.folder = run_folder.RUNS / f"{config.name}{'' if _has_weights(config) else '-untrained'}"
        run_folder.check_writable(self.folder)

    def _derived_name(self, config: Namespace) -> str:
        files = [Path(str(file)) for file in config.get("config") or []]
        if files:
            return files[0].stem if files[0].stem != "config" else files[0].resolve().parent.name
        return "_".join(str(config[key].class_path).rpartition(".")[2].lower() for key in ("model", "data"))

    def instantiate_classes(self) -> None:
        """Build the data, the model and the trainer."""
        super().instantiate_classes()
        classes = getattr(self.datamodule, "num_classes", None)
        if None not in (classes, self._checkpoint_classes) and classes != self._checkpoint_classes:
            raise UserError(
                f"the checkpoint was trained for {self._checkpoint_classes} classes, "
                f"but {type(self.datamodule).__name__} has {classes}"
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        named = config.get("callbacks") or []
        named = list(named) if isinstance(named, list) else [named]
        config["callbacks"] = [*named, *self._default_callbacks(named, config), self.stage]
        if self.folder is not None:
            config["default_root_dir"] = str(self.folder)
        given = config.get("logger")
        if given is not False:
            others = [] if given in (None, True) else list(given) if isinstance(given, list) else [given]
            if self.subcommand == "fit" and self.folder is not None:
                # First, because Lightning asks the first logger where the run's files go.
                others = [run_folder.RunLogger(self.folder), *others]
            config["logger"] = others or False
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        config["plugins"] = plugins
        self.config[self.subcommand]["ckpt_path"] = None  # what is saved describes the run, not how it was started
        if self.subcommand != "fit" or self.folder is None:
            self.save_config_callback: type[SaveConfigCallback] | None = None
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (ValueError, MisconfigurationException) as error:  # no such strategy, no such device, ...
            raise UserError(f"trainer: {error}") from error

    def _domain_callbacks(self) -> Iterator[str]:
        """Where there are domains: their pictures, and validators for a method that sees the target in training."""
        if not isinstance(self.datamodule, DomainData):
            return
        adapts = "target" in getattr(self.model, "roles", ()) and sees_target(self.datamodule)
        if adapts and self.subcommand in ("fit", "validate"):
            yield "TransferValidation"
        if self.subcommand in ("fit", "test") and getattr(self.model, "source_views", None) != ():
            yield "DomainPictures"  # they show the source, which a method without source views must not read

    def _default_callbacks(self, named: list[Callback], config: dict[str, Any]) -> Iterator[Callback]:
        """The callbacks of every run, where the config names none of that class."""
        writer = getattr(self.model, "prediction_writer", "PredictionWriter")
        more = [writer] if self.subcommand == "predict" else self._domain_callbacks()
        for name in (*DEFAULT_CALLBACKS, *more):
            kind = getattr(callbacks, name)
            if not any(isinstance(callback, kind) for callback in named):
                yield kind()
        keeps = config.get("enable_checkpointing") is not False and self.subcommand == "fit"
        if keeps and not any(isinstance(callback, Checkpoint) for callback in named):
            yield RunCheckpoint()
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in named):
            # A file or a pipe gets few lines instead of thousands.
            yield _Bar(refresh_rate=20 if sys.stderr.isatty() else 0)


# --- checkpoints on the command line ----------------------------------------------------------------------------------


def read_hyperparameters(path: Path) -> dict[str, Any]:
    """The recorded arguments of a checkpoint, without reading its tensors.

    Raises:
        UserError: when the file is no checkpoint.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        raise UserError(f"--ckpt_path: {path} is not a checkpoint that can be read safely ({first})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"--ckpt_path: {path} is not a checkpoint of a run (it has no state_dict)")
    return dict(content.get("hyper_parameters") or {})


def typed_for_tests(class_path: str, recorded: Mapping[str, Any], typed: Namespace) -> dict[str, Any]:
    """What was typed of the arguments that a method reads in tests alone: it counts, whatever a checkpoint recorded.

    Args:
        class_path: of the method that was recorded.
        recorded: its arguments.
        typed: what the command line and its configs say about the model.
    """
    given = typed.as_dict()
    module, _, name = class_path.rpartition(".")
    if str(given.get("class_path")).rpartition(".")[2] != name:
        return {}
    try:
        method = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return {}  # what follows says so
    arguments = given.get("init_args") or {}
    chosen = {}
    for argument in getattr(method, "test_arguments", ()):
        if argument not in arguments:
            continue
        old, new = recorded.get(argument), arguments[argument]
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("class_path") == new.get("class_path"):
            new = {**old, "init_args": {**(old.get("init_args") or {}), **(new.get("init_args") or {})}}
        chosen[argument] = new
    return chosen


def _has_weights(config: Namespace) -> bool:
    """Whether the network brings weights of a whole trained network, so that there is something to test.

    Raises:
        UserError: for a file that is not there.
    """
    network = flatten(config.get("model") or Namespace())
    weights = str(network.get("init_args.network.init_args.weights") or "")
    if weights == "pretrained" and str(network.get("init_args.network.class_path")).endswith(".DualEncoder"):
        return True  # its classes are told in words
    path = Path(weights).expanduser()
    if path.suffix in (".ckpt", ".safetensors", ".pt", ".pth", ".bin") and not path.exists():
        raise UserError(
            f"--model.network.weights: no file {weights!r}.{suggest(weights, map(str, catalog.checkpoints()))}"
        )
    return bool(weights) and path.exists() and network.get("init_args.network.init_args.weights_part") != "backbone"


def _no_checkpoint(subcommand: str) -> str:
    newest = catalog.checkpoints()
    known = "Newest: " + ", ".join(map(str, newest)) if newest else "There is none under runs/ yet: run zoo fit first"
    return (
        f"{subcommand} needs --ckpt_path: without one, random weights would be scored. {known}."
        " (A network trained elsewhere: --model.network.weights FILE; --untrained true scores random weights "
        "knowingly)"
    )


def _option(argv: Sequence[str], *names: str) -> list[str]:
    """Values of ``--name value`` and ``--name=value``."""
    values = [value for name, value in itertools.pairwise(argv) if name in names]
    return values + [a.split("=", 1)[1] for a in argv if a.split("=", 1)[0] in names and "=" in a]


def complete(argv: Sequence[str]) -> list[str]:
    """Add what ``--ckpt_path`` implies: the run's config where nothing else is given, else the model's class.

    Raises:
        UserError: for a checkpoint or a config that does not exist.
    """
    argv = list(argv)
    for file in _option(argv, "-c", "--config"):
        if not Path(file).is_file():
            known = [str(path) for path in catalog.configs()]
            by_stem = next((path for path in known if Path(path).stem == Path(file).stem), None)
            hint = f" Did you mean {by_stem!r}?" if by_stem else suggest(file, known)
            raise UserError(f"--config: no file {file!r}.{hint}")
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where is not None else ""
            raise UserError(f"{file}{line}: not valid YAML ({getattr(error, 'problem', error)})") from error
        if not isinstance(content, dict):
            raise UserError(f"{file}: a config is a mapping with model, data and trainer")
    paths = _option(argv, "--ckpt_path")
    if not paths or paths[-1] in ("null", "None", ""):
        return argv
    path = run_folder.existing_checkpoint(paths[-1])
    configs = _option(argv, "-c", "--config")
    beside = catalog.run_config(path)
    if not configs and beside is not None and not any(a.split("=")[0] in ("--model", "--data") for a in argv):
        return [argv[0], "--config", str(beside), *argv[1:]]
    if not any("model" in (yaml.safe_load(Path(file).read_text()) or {}) for file in configs):
        recorded = read_hyperparameters(path)
        if class_path := recorded.get("_class_path"):
            values = {k: v for k, v in recorded.items() if not k.startswith("_") and k != "num_classes"}
            return [argv[0], "--model", json.dumps({"class_path": class_path, "init_args": values}), *argv[1:]]
    return argv


# --- entry ------------------------------------------------------------------------------------------------------------


def _say(message: str) -> None:
    print(f"zoo: {message}", file=sys.stderr)  # noqa: T201


def _quiet() -> None:
    import logging

    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)


def import_all() -> None:
    """Import what short names may mean: every method, source, regime and callback."""
    zoo._import_methods()
    for name in ("datamodules", "datamodules.sources", "zoo.core.network", "zoo.core.schedules", "zoo.policies"):
        importlib.import_module(name)


def _ours(error: BaseException) -> bool:
    """Whether the error was raised by this project's own code rather than inside a library."""
    frames = traceback.extract_tb(error.__traceback__)
    folders = tuple(str(catalog.PACKAGE.parent / name) + os.sep for name in ("zoo", "datamodules", "callbacks"))
    return bool(frames) and frames[-1].filename.startswith(folders)


def _cause(error: BaseException) -> BaseException:
    """The error of ours that a library has wrapped into its own, or the error itself."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            return inner
        inner = inner.__cause__
    return error


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        argv: the command line from the subcommand on; None takes that of the process.

    Returns:
        0, or 2 for something that the user can mend.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `--model mymethod.Mine` of the user's own folder
    _quiet()
    stage = _Stage()
    try:
        import_all()
        ZooCLI(complete(argv), stage)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 2 if exit_.code else 0
    except Exception as error:
        told = error if isinstance(error, UserError) or stage.started else _cause(error)
        mendable = isinstance(told, UserError) or (
            not stage.started
            and (
                isinstance(error, MisconfigurationException)
                or (isinstance(error, ValueError | TypeError | OSError) and _ours(error))
            )
        )
        if not mendable or os.environ.get("ZOO_TRACEBACK") == "1":
            raise
        _say(str(told))
        return 2
    finally:
        run_folder.release()
    return 0
