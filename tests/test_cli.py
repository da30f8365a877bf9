"""The command line from outside: what is typed, what is said, what lies on disk afterwards."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from zoo import cli, run_folder
from zoo.core.errors import UserError

TOY = '''
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from datamodules.base import Data
from zoo import Method, Supervised


class ToyData(Data):
    """Images whose mean tells the class.

    Args:
        kinds: number of classes.
        batch_size: samples per step.
        broken: fail while preparing with this kind of error.
        validate: whether there is a validation set.
    """

    def __init__(self, kinds: int = 3, batch_size: int = 8, broken: str = "", validate: bool = True) -> None:
        super(Data, self).__init__()
        self.kinds, self.batch_size, self.broken, self.validates = kinds, batch_size, broken, validate

    num_classes = property(lambda self: self.kinds)

    def roles(self): return {}

    def prepare_data(self):
        if self.broken == "file":
            open("/no/such/file")
        if self.broken == "user":
            from zoo.core.errors import UserError
            raise UserError("ToyData: broken=user")

    def setup(self, stage): pass
    def on_after_batch_transfer(self, batch, dataloader_idx): return batch
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

    def samples(self, count):
        generator = torch.Generator().manual_seed(0)
        label = torch.randint(self.kinds, (count,), generator=generator)
        image = torch.randn(count, 1, 28, 28, generator=generator) + label[:, None, None, None]
        return [{"image": image[i], "label": label[i], "index": torch.tensor(i)} for i in range(count)]

    def train_dataloader(self):
        return CombinedLoader({"labeled": DataLoader(self.samples(16), batch_size=self.batch_size)}, "min_size")

    def val_dataloader(self): return {"val": DataLoader(self.samples(12), batch_size=8)} if self.validates else []
    def test_dataloader(self): return {"test": DataLoader(self.samples(12), batch_size=8)}
    def predict_dataloader(self): return DataLoader(self.samples(12), batch_size=8)


class Mine(Supervised):
    """A user's own method.

    Args:
        extra: any number.
        explode: raise in training.
        **kwargs: of Supervised.
    """

    def __init__(self, extra: float = 1.0, explode: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.extra, self.explode = extra, explode

    def training_step(self, batch, batch_idx):
        if self.explode:
            raise ValueError("in the middle of training")
        return super().training_step(batch, batch_idx)
'''
CONFIG = """
model:
  class_path: Supervised
  init_args:
    network: {class_path: Network, init_args: {backbone: lenet, in_channels: 1}}
data: {class_path: own_toys.ToyData}
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """An empty working directory with a user's own module and one config, ``toy.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_toys", raising=False)
    (tmp_path / "own_toys.py").write_text(TOY)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    yield tmp_path
    run_folder.release()


@pytest.fixture
def trained(toys, monkeypatch):
    assert cli.main(["fit", "-c", "toy.yaml"]) == 0
    return toys / "runs" / "toy"


def said(capsys) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "usage:" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("zoo: ")]
    assert len(lines) == 1, captured.err
    return lines[0]


def refused(capsys, *argv: str) -> str:
    assert cli.main(list(argv)) == 2
    return said(capsys)


# --- run folders ------------------------------------------------------------------------------------------------------


def test_run_folder_holds_config_metrics_and_checkpoints(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["name"] == "toy"
    assert config["seed_everything"] == 0
    assert config["model"]["class_path"] == "zoo.Supervised"
    assert config["ckpt_path"] is None
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert [row["val/accuracy"] != "" for row in rows] == [True, True]
    assert not (trained / "hparams.yaml").exists()


def test_checkpoint_is_plain_and_names_the_public_class(trained):
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["_class_path"] == "zoo.Supervised"
    assert content["hyper_parameters"]["num_classes"] == 3
    assert content["global_step"] == 4


def test_second_run_of_a_name_takes_a_new_folder(trained):
    before = (trained / "checkpoints" / "last.ckpt").read_bytes()
    assert cli.main(["fit", "-c", "toy.yaml"]) == 0
    assert (trained / "checkpoints" / "last.ckpt").read_bytes() == before
    assert (trained.parent / "toy-2" / "checkpoints" / "last.ckpt").is_file()
    # and so does a run of the saved config, whose recorded name is the plain one
    assert cli.main(["fit", "-c", "runs/toy-2/config.yaml", "--trainer.max_epochs=1"]) == 0
    assert (trained.parent / "toy-3").is_dir()


def test_name_and_folder_can_be_chosen(toys, capsys):
    assert cli.main(["fit", "-c", "toy.yaml", "--name", "first", "--trainer.max_epochs=1"]) == 0
    assert (toys / "runs/first/checkpoints/last.ckpt").is_file()
    chosen = ["fit", "-c", "toy.yaml", "--trainer.default_root_dir=here", "--trainer.max_epochs=1"]
    assert cli.main(chosen) == 0
    assert (toys / "here/checkpoints/last.ckpt").is_file()
    capsys.readouterr()
    assert "already holds a run" in refused(capsys, *chosen)


def test_fast_dev_run_leaves_nothing(toys):
    assert cli.main(["fit", "-c", "toy.yaml", "--trainer.fast_dev_run=true"]) == 0
    assert not (toys / "runs").exists()


def test_run_without_validation_has_a_last_checkpoint_only(toys):
    assert cli.main(["fit", "-c", "toy.yaml", "--data.validate=false"]) == 0
    assert [path.name for path in (toys / "runs/toy/checkpoints").iterdir()] == ["last.ckpt"]


def test_resuming_stays_in_the_folder_and_keeps_the_metrics(trained):
    last = str(trained / "checkpoints" / "last.ckpt")
    assert cli.main(["fit", "--ckpt_path", last, "--trainer.max_epochs=3"]) == 0
    assert [path.name for path in trained.parent.iterdir()] == ["toy"]
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert [row["epoch"] for row in rows if row["val/accuracy"]] == ["0", "1", "2"]
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_unwritable_run_folder_is_said_before_training(toys, capsys):
    (toys / "runs").write_text("a file where the folder should be")
    assert "cannot write to the run folder" in refused(capsys, "fit", "-c", "toy.yaml")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_testing_a_checkpoint_alone_scores_its_weights(trained, capsys):
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    before = {path.name: path.read_bytes() for path in trained.glob("*.*") if path.suffix in (".yaml", ".csv")}
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    capsys.readouterr()
    assert cli.main(["test", "--ckpt_path", checkpoint]) == 0
    out = capsys.readouterr().out
    # ToyData tests on the samples that it validates on
    assert f"{float(rows[-1]['val/accuracy']):.4f}"[:6] in out
    assert {path.name: path.read_bytes() for path in trained.glob("*.*") if path.name in before} == before


def test_model_is_read_from_the_checkpoint_where_only_data_is_typed(trained):
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    data = ["--data", "own_toys.ToyData", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert cli.main(["test", *data, "--ckpt_path", checkpoint]) == 0
    assert cli.main(["test", "-c", str(trained / "config.yaml"), f"--ckpt_path={checkpoint}"]) == 0


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_nothing_is_scored_without_a_checkpoint(trained, command, capsys):
    capsys.readouterr()
    message = refused(capsys, command, "-c", "toy.yaml")
    assert "runs/toy/checkpoints/last.ckpt" in message
    assert "--untrained" in message


def test_untrained_weights_are_scored_knowingly(toys):
    assert cli.main(["test", "-c", "toy.yaml", "--untrained", "true"]) == 0
    assert not (toys / "runs" / "toy").exists()


def test_values_that_the_checkpoint_overrides_are_reported(trained, capsys):
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    argv = ["test", "-c", "toy.yaml", "--ckpt_path", checkpoint]
    assert cli.main([*argv, "--model.decay_norms_and_biases", "true", "--model.momentum=null"]) == 0
    message = said(capsys)  # one line: what was typed as it is recorded goes unmentioned
    assert message.startswith(
        "zoo: model.decay_norms_and_biases: typed True, checkpoint says False (the checkpoint wins"
    )
    assert cli.main([*argv, "--model", "own_toys.Mine", "--model.network", "Network"]) == 0
    assert "zoo: model: typed own_toys.Mine, checkpoint says zoo.Supervised" in capsys.readouterr().err
    assert cli.main(argv) == 0
    assert "typed" not in capsys.readouterr().err


def test_other_number_of_classes_is_refused(trained, capsys):
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    message = refused(capsys, "test", "--ckpt_path", checkpoint, "--data.kinds", "5")
    assert "3 classes" in message
    assert "5" in message


@pytest.mark.parametrize("name", ["runs/toy/checkpoints/lst.ckpt", "runs/tyo/checkpoints/last.ckpt"])
def test_missing_checkpoint_names_the_nearest(trained, name, capsys):
    capsys.readouterr()
    assert "Did you mean 'runs/toy/checkpoints/last.ckpt'?" in refused(capsys, "test", "--ckpt_path", name)


def test_file_that_is_no_checkpoint(toys, capsys):
    (toys / "x.ckpt").write_text("text")
    assert "is not a checkpoint" in refused(capsys, "test", "-c", "toy.yaml", "--ckpt_path", "x.ckpt")


def test_predictions_are_written(trained):
    assert cli.main(["predict", "--ckpt_path", str(trained / "checkpoints" / "best.ckpt")]) == 0
    written = load_file(trained / "predictions.safetensors")
    assert written["index"].tolist() == list(range(12))
    torch.testing.assert_close(written["probabilities"].sum(dim=1), torch.ones(12))
    assert sorted(path.name for path in trained.glob("predictions*")) == ["predictions.csv", "predictions.safetensors"]


def test_predictions_on_a_folder_of_images(toys):
    from PIL import Image

    (toys / "photos" / "deeper").mkdir(parents=True)
    for name, grey in (("b.png", 0), ("a.png", 90), ("deeper/c.jpg", 250)):
        Image.new("RGB", (9, 12), (grey, grey, grey)).save(toys / "photos" / name)
    data = "{class_path: SupervisedData, init_args: {source: Blobs, batch_size: 8, steps: 2}}"
    (toys / "blobs.yaml").write_text(CONFIG.replace("{class_path: own_toys.ToyData}", data))
    assert cli.main(["fit", "-c", "blobs.yaml"]) == 0
    run = toys / "runs" / "blobs"
    assert cli.main(["predict", f"--ckpt_path={run}/checkpoints/last.ckpt", "--data.predict_folder", "photos"]) == 0
    with open(run / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["photos/a.png", "photos/b.png", "photos/deeper/c.jpg"]
    best, label = load_file(run / "predictions.safetensors")["probabilities"].max(dim=1)
    assert [row["label"] for row in rows] == [f"blob {number}" for number in label.tolist()]
    assert [float(row["confidence"]) for row in rows] == pytest.approx(best.tolist(), abs=1e-6)


# --- errors -----------------------------------------------------------------------------------------------------------

TYPED = [
    (["--model", "FixMach"], "'FixMach' is not a known class. Did you mean 'FixMatch'?"),
    (["--model", "zoo.FixMach"], "Did you mean 'FixMatch'?"),
    (["--model", "nowhere.Mine"], "there is no module 'nowhere'"),
    (["--data", "ToyDta"], "'ToyDta' is not a known class. Did you mean 'ToyData'?"),
    (["--model.momentm", "0.5"], "Supervised has no argument 'momentm'. Did you mean 'momentum'?"),
    (["--model.momentum", "high"], "'momentum' must be float or null, got 'high'"),
    (["--model.network.backbon", "x"], "Network has no argument 'backbon'. Did you mean 'backbone'?"),
    (["--model.network.init_args.dropout", "x"], "Network: 'dropout' must be float, got 'x'"),
    (["--model.network", "Netwrk"], "'Netwrk' is not a known class. Did you mean 'Network'?"),
    (["--model.scheduler", "CosinLR"], "Did you mean 'CosineLR'?"),
    (["--model.optimizer", "AdmW"], "Did you mean 'AdamW'?"),
    (["--model.optimizer", "torch.optim.SDG"], "torch.optim has no 'SDG'. Did you mean 'SGD'?"),
    (["--data.batch_sise", "3"], "ToyData has no argument 'batch_sise'. Did you mean 'batch_size'?"),
    (["--trainer.max_epoch", "3"], "Did you mean '--trainer.max_epochs'?"),
    (["--trainr.max_epochs", "3"], "Did you mean '--trainer.max_epochs'?"),
    (["--trainer.max_epochs", "three"], "'trainer.max_epochs' must be int or null, got 'three'"),
    (["--trainer.callbacks+=EarlyStoping"], "Did you mean 'EarlyStopping'?"),
    (["--trainer.strategy=ddpp"], "trainer: "),
    (["stray"], "'stray' is not understood"),
    (["-c", "tooy.yaml"], "no file 'tooy.yaml'"),
]


@pytest.mark.parametrize(("typed", "expected"), TYPED, ids=[" ".join(case[0]) for case in TYPED])
def test_misspelt_on_the_command_line(toys, typed, expected, capsys):
    assert expected in refused(capsys, "fit", "-c", "toy.yaml", *typed)
    assert not list(toys.glob("runs/*/checkpoints"))


WRITTEN = [
    ("modle: {class_path: Supervised}", "there is no key 'modle'. Did you mean 'model'?"),
    ("trainer: {max_epoch: 3}", "Did you mean 'trainer.max_epochs'?"),
    ("model: {class_path: Supervised, init_arg: {momentum: 0.5}}", "Did you mean 'init_args'?"),
    ("model: {class_path: FixMach}", "Did you mean 'FixMatch'?"),
    ("model:\n  class_path: x\n   init_args: 3", "extra.yaml, line 3: not valid YAML"),
    ("just text", "a config is a mapping"),
    ("trainer: {callbacks: [{class_path: EarlyStoping}]}", "Did you mean 'EarlyStopping'?"),
]


@pytest.mark.parametrize(("text", "expected"), WRITTEN, ids=[case[0][:30] for case in WRITTEN])
def test_misspelt_in_a_config(toys, text, expected, capsys):
    (toys / "extra.yaml").write_text(text)
    assert expected in refused(capsys, "fit", "-c", "toy.yaml", "-c", "extra.yaml")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fit", "--data", "own_toys.ToyData"], "--model is needed"),
        (["fit", "--model", "Supervised", "--model.network=Network"], "--data is needed"),
        (["fit", "--model", "Supervised", "--data", "own_toys.ToyData"], "Supervised needs network"),
        ([], "a subcommand is needed"),
    ],
)
def test_missing(toys, argv, expected, capsys):
    assert expected in refused(capsys, *argv)


def test_errors_of_the_data_before_training_are_one_message(toys, capsys, monkeypatch):
    assert refused(capsys, "fit", "-c", "toy.yaml", "--data.broken=user") == "zoo: ToyData: broken=user"
    monkeypatch.setenv("ZOO_TRACEBACK", "1")
    with pytest.raises(UserError, match="broken=user"):
        cli.main(["fit", "-c", "toy.yaml", "--data.broken=user"])


def test_errors_in_training_keep_their_traceback(toys):
    argv = ["fit", "-c", "toy.yaml", "--model=own_toys.Mine", "--model.network.backbone=lenet"]
    with pytest.raises(ValueError, match="in the middle of training"):
        cli.main([*argv, "--model.network.in_channels=1", "--model.explode=true"])


def test_a_users_own_method_trains_and_is_found_again(toys):
    own = ["--model=own_toys.Mine", "--model.network=Network", "--model.network.backbone=lenet"]
    own += ["--model.network.in_channels=1", "--model.extra=2.5"]
    rest = ["--data=own_toys.ToyData", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert cli.main(["fit", *own, *rest, "--trainer.enable_progress_bar=false"]) == 0
    checkpoint = Path("runs/mine_toydata/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["extra"] == 2.5
    assert cli.main(["test", "--ckpt_path", str(checkpoint)]) == 0


def test_front_door_finds_modules_of_the_working_directory(toys):
    """In a process of its own, where nothing put the working directory on the path."""
    code = "import sys; sys.path = [p for p in sys.path if p]; from zoo.__main__ import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "fit", "-c", "toy.yaml", "--print_config"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=toys)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["data"]["class_path"] == "own_toys.ToyData"
    assert done.stderr == ""


# --- defaults ---------------------------------------------------------------------------------------------------------


def trainer_of(monkeypatch, *argv: str):
    """The trainer that a command line would run."""
    kept = {}
    monkeypatch.setattr(cli.ZooCLI, "_run_subcommand", lambda self, name: kept.update(trainer=self.trainer))
    assert cli.main(list(argv)) == 0
    return kept["trainer"]


def test_default_callbacks_are_added_once(toys, monkeypatch):
    names = [type(c).__name__ for c in trainer_of(monkeypatch, "fit", "-c", "toy.yaml").callbacks]
    assert set(names) >= {*cli.DEFAULT_CALLBACKS, "RunCheckpoint"}
    assert not [name for name in names if names.count(name) > 1]
    typed = ["--trainer.callbacks+=EMATeacher", "--trainer.callbacks+=ModelCheckpoint"]
    names = [type(c).__name__ for c in trainer_of(monkeypatch, "fit", "-c", "toy.yaml", *typed).callbacks]
    assert names.count("EMATeacher") == 1
    assert "RunCheckpoint" not in names
    assert "ModelCheckpoint" in names


DOMAINS = """
model:
  class_path: METHOD
  init_args: {network: {class_path: Network, init_args: {backbone: tiny_cnn, in_channels: 1}}}
data:
  class_path: DATA
  init_args: {source: [{class_path: Blobs}], target: {class_path: Blobs}, steps: 2, batch_size: 8}
trainer: {max_epochs: 1, accelerator: cpu}
"""


@pytest.mark.parametrize(
    ("method", "data", "validates"),
    [
        ("DANN", "DomainData", True),
        ("SourceOnly", "DomainData", False),
        ("SourceOnly", "GeneralizationData", False),
        ("FST, method: SelfEnsembling", "DomainData", True),  # what stands around a method sees what that sees
    ],
)
def test_validators_and_pictures_where_there_are_domains(tmp_path, monkeypatch, method, data, validates):
    monkeypatch.chdir(tmp_path)
    method, _, inner = method.partition(", method: ")
    config = DOMAINS.replace("METHOD", method).replace("DATA", data)
    if inner:
        config = config.replace("init_args: {network", f"init_args: {{method: {{class_path: {inner}}}, network")
    (tmp_path / "domains.yaml").write_text(config)
    callbacks = trainer_of(monkeypatch, "fit", "-c", "domains.yaml").callbacks
    names = [type(c).__name__ for c in callbacks]
    assert ("TransferValidation" in names) == validates
    assert names.count("DomainPictures") == 1
    names = [
        type(c).__name__ for c in trainer_of(monkeypatch, "test", "-c", "domains.yaml", "--untrained=true").callbacks
    ]
    assert "TransferValidation" not in names
    assert names.count("DomainPictures") == 1


def test_named_logger_and_plugins_are_respected(toys, monkeypatch):
    typed = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere"]
    trainer = trainer_of(monkeypatch, "fit", "-c", "toy.yaml", *typed)
    assert [type(logger).__name__ for logger in trainer.loggers] == ["RunLogger", "CSVLogger"]
    assert trainer.loggers[1].save_dir == "elsewhere"
    assert type(trainer.strategy.checkpoint_io).__name__ == "AtomicCheckpointIO"
    assert trainer_of(monkeypatch, "fit", "-c", "toy.yaml", "--trainer.logger=false").loggers == []


def test_a_run_keeps_its_folder_beside_tensorboard(toys, monkeypatch):
    """TensorBoardLogger itself, on a writer that only notes what it is given."""
    import lightning.fabric.loggers.tensorboard as boards

    seen = {"scalars": set(), "images": []}

    class SummaryWriter:
        def __init__(self, **_):
            pass

        def add_scalar(self, name, value, step):
            seen["scalars"].add(name)

        def add_image(self, name, pixels, step, dataformats):
            seen["images"].append((name, step, pixels.shape[2]))

        def __getattr__(self, name):
            return lambda *_, **__: None

    module = type(sys)("tensorboardX")
    module.SummaryWriter = SummaryWriter
    hyperparameters = type(sys)("tensorboardX.summary")
    hyperparameters.hparams = lambda *_: (None, None, None)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "tensorboardX.summary", hyperparameters)
    monkeypatch.setattr(boards, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(boards, "_TENSORBOARDX_AVAILABLE", True)
    typed = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=boards", "--trainer.log_every_n_steps=1"]
    assert cli.main(["fit", "-c", "toy.yaml", *typed]) == 0
    assert {"train/loss", "val/accuracy", "throughput/data_wait"} <= seen["scalars"]
    assert seen["images"] == [("summary", 4, 3)]
    found = {path.name for path in Path("runs/toy").iterdir()}
    assert found >= {"checkpoints", "config.yaml", "metrics.csv", "metrics.json", "summary.png"}
    assert not list(Path("boards").rglob("*.ckpt"))


def test_other_ranks_follow_the_folder_of_rank_zero(toys, monkeypatch):
    (toys / "runs/x/checkpoints").mkdir(parents=True)
    chosen = run_folder.claim("x")
    assert chosen == Path("runs/x-2")
    (chosen / "config.yaml").write_text("")
    assert run_folder.claim("x") == chosen  # a process that rank 0 started inherits its environment
    run_folder.release()
    monkeypatch.setenv("RANK", "1")  # one that a launcher started chooses nothing
    assert run_folder.claim("y") == Path("runs/y")
    assert not Path("runs/y").exists()


def test_a_null_inside_a_recipe_is_null(toys):
    (toys / "named.yaml").write_text(CONFIG.replace("lenet,", "lenet, weights: somewhere.ckpt,"))
    assert (
        cli.main(["fit", "-c", "named.yaml", "--model.network.weights=null"]) == 0
    )  # "None" would be sought as a file


# --- adapting while tested --------------------------------------------------------------------------------------------

ADAPTING = """
model:
  class_path: {0}
  init_args:
    network: {{class_path: Network, init_args: {{backbone: tiny_cnn, in_channels: 1, arguments: {{width: 4}}}}}}
    {1}
data:
  class_path: DomainData
  init_args:
    source: {{class_path: Blobs, init_args: {{num_classes: 3, size: 12, channels: 1, samples: 60, test_samples: 30}}}}
    target: {{class_path: Blobs, init_args: {{num_classes: 3, size: 12, channels: 1, samples: 60, test_samples: 30}}}}
    batch_size: 8
    steps: 2
    val_size: 12
    eval_batch_size: 10
trainer: {{max_epochs: 1, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}}
"""


@pytest.fixture
def source_trained(tmp_path, monkeypatch):
    """A run that knows nothing of adaptation: its last checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source.yaml").write_text(ADAPTING.format("SourceOnly", ""))
    assert cli.main(["fit", "-c", "source.yaml"]) == 0
    yield str(tmp_path / "runs" / "source" / "checkpoints" / "last.ckpt")
    run_folder.release()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Tent", ""),
        ("AdaptiveBatchNorm", "whole_set: true"),
        ("T3A", "supports: 5"),
        ("EATA", "adaptation_optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}"),
        ("SAR", "collapse: 0.0"),
        ("ITTA", "adaptation_optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}"),
    ],
)
def test_a_network_trained_otherwise_adapts_when_tested(source_trained, name, more, capsys):
    Path("adapting.yaml").write_text(ADAPTING.format(name, more))
    before = Path(source_trained).read_bytes()
    capsys.readouterr()
    argv = ["-c", "adapting.yaml", "--model.network.weights", source_trained]
    metrics = []
    for _ in range(2):
        assert cli.main(["test", *argv]) == 0
        metrics.append(json.loads(Path("runs/adapting/metrics.json").read_text())["metrics"])
    assert metrics[0] == metrics[1]
    assert {"test/accuracy", "unadapted/accuracy"} <= metrics[0].keys()
    out = capsys.readouterr().out
    assert "unadapted/accuracy" in out
    assert cli.main(["predict", *argv]) == 0
    assert len(Path("runs/adapting/predictions.csv").read_text().splitlines()) == 31
    assert Path(source_trained).read_bytes() == before


def test_a_whole_run_adapts_at_its_end_and_its_checkpoint_again(source_trained):
    Path("adapting.yaml").write_text(ADAPTING.format("Tent", ""))
    assert cli.main(["fit", "-c", "adapting.yaml"]) == 0
    checkpoint = "runs/adapting/checkpoints/last.ckpt"
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(name.startswith("network.") for name in names)
    assert cli.main(["test", "--ckpt_path", checkpoint]) == 0
    assert "unadapted/accuracy" in json.loads(Path("runs/adapting/metrics.json").read_text())["metrics"]


def test_how_a_checkpoint_adapts_is_what_is_typed(source_trained, monkeypatch, capsys):
    Path("adapting.yaml").write_text(ADAPTING.format("Tent", ""))
    assert cli.main(["fit", "-c", "adapting.yaml"]) == 0
    made, configure = [], cli.ZooCLI.instantiate_classes
    monkeypatch.setattr(cli.ZooCLI, "instantiate_classes", lambda self: made.append(self) or configure(self))
    capsys.readouterr()
    argv = ["test", "--ckpt_path", "runs/adapting/checkpoints/last.ckpt"]
    typed = ["--model.adaptation_optimizer.init_args.lr=0.25", "--model.mode=episodic", "--model.optimizer.lr=0.5"]
    assert cli.main([*argv, *typed]) == 0
    ours = made[0].model
    (group,) = ours.adaptation_optimizer_recipe([torch.zeros(1, requires_grad=True)]).param_groups
    assert (group["lr"], ours.mode, ours.optimizer_recipe.keywords["lr"]) == (0.25, "episodic", 0.03)
    said = capsys.readouterr().err
    assert "model.optimizer.lr: typed 0.5, checkpoint says 0.03" in said
    assert "adaptation_optimizer" not in said
    assert "mode" not in said.replace("model", "")


def test_weights_without_a_head_are_not_tested(source_trained, capsys):
    Path("adapting.yaml").write_text(ADAPTING.format("Tent", ""))
    capsys.readouterr()
    argv = ["test", "-c", "adapting.yaml", "--model.network.weights", source_trained]
    assert "needs --ckpt_path" in refused(capsys, *argv, "--model.network.weights_part", "backbone")
    message = refused(capsys, *argv[:-1], "no_such.ckpt")
    assert "no_such.ckpt" in message
