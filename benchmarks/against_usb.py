"""A whole FixMatch step, data included, against USB's own code: see configs/benchmarks/against_usb.yaml."""

import importlib
import json
import resource
import sys
import tempfile
import time
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.step import make_trainer
from zoo.benchmark import percentile

CLASSES = 10
SKIP = 1  # first steps warm up


def images(count: int) -> Tensor:
    """Noise of CIFAR's shape, a little smoothed: what an image costs does not depend on what it shows."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


def _figures(times: list[float], forms: float) -> dict[str, float]:
    kept = times[SKIP:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "cpu_seconds_per_step": round(percentile(kept, 0.2), 3),
        "peak_mib_over_start": round(peak - forms, 1),
        "steps": len(kept),
    }


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def usb(path: str, steps: int = 4, size: int = 64, ratio: int = 7, joint: bool = True) -> dict[str, float]:
    """USB's dataset, augmentation, network, step, update and average of weights, on the CPU without workers.

    Args:
        path: a checkout of github.com/microsoft/Semi-supervised-learning.
        steps: steps, the first of which is not counted.
        size: labeled images of a step.
        ratio: unlabeled images per labeled one.
        joint: USB's ``use_cat``, True in all its configs.
    """
    # The packages' own __init__ files import everything, and some of that no longer imports: only what is used is read.
    root = Path(path) / "semilearn"
    if not root.is_dir():
        raise FileNotFoundError(f"path={path!r} is no checkout of USB: it has no folder semilearn")
    for file in sorted(root.rglob("__init__.py")):
        package: Any = types.ModuleType(".".join(file.parent.relative_to(path).parts))
        package.__path__ = [str(file.parent)]
        sys.modules[package.__name__] = package
    for name in ("ruamel", "ruamel.yaml", "torch.utils.tensorboard"):  # imported beside what is used
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = None  # type: ignore[attr-defined]

    def find(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"semilearn.{module}"), name)

    augment: Any = sys.modules["semilearn.datasets.augmentation"]
    augment.RandAugment = find("datasets.augmentation.randaugment", "RandAugment")
    utils: Any = sys.modules["semilearn.core.utils"]
    utils.EMA = find("core.utils.misc", "EMA")
    hooks: Any = sys.modules["semilearn.core.hooks"]
    hooks.Hook = find("core.hooks.hook", "Hook")
    dataset = find("datasets.cv_datasets.datasetbase", "BasicDataset")
    network = find("nets.wrn.wrn", "wrn_28_2")
    cross_entropy, consistency = (
        find("core.criterions.cross_entropy", "ce_loss"),
        find("core.criterions.consistency", "consistency_loss"),
    )
    update, average = find("core.hooks.param_update", "ParamUpdateHook")(), find("core.hooks.ema", "EMAHook")()
    options: Any = sys.modules["semilearn.algorithms.utils"]
    options.smooth_targets = options.SSL_Argument = options.str2bool = None  # not called here
    pseudo_label = find("algorithms.hooks.pseudo_label", "PseudoLabelingHook")()
    masking = find("algorithms.hooks.masking", "FixedThresholdingHook")()

    from torchvision import transforms

    flip = [
        transforms.Resize(32),
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
    ]
    tensor = [transforms.ToTensor(), transforms.Normalize((0.49, 0.48, 0.45), (0.23, 0.22, 0.23))]
    weak = transforms.Compose([*flip, *tensor])
    strong = transforms.Compose([*flip, augment.RandAugment(3, 5), *tensor])
    pixels = images(5000).permute(0, 2, 3, 1).numpy()
    labels = [number % CLASSES for number in range(5000)]
    labeled = dataset("fixmatch", pixels[:200], labels[:200], CLASSES, weak, False, strong, strong)
    unlabeled = dataset("fixmatch", pixels, labels, CLASSES, weak, True, strong, strong)

    def loader(data: Any, count: int) -> DataLoader:
        sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=count * steps)
        return DataLoader(data, batch_size=count, sampler=sampler, drop_last=True)

    torch.manual_seed(0)
    model = network(num_classes=CLASSES)
    average_model = network(num_classes=CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4, nesterov=True)
    calls = {"gen_ulb_targets": pseudo_label.gen_ulb_targets, "masking": masking.masking}
    run = types.SimpleNamespace(
        model=model, ema_model=average_model, ema_m=0.999, resume=False, optimizer=optimizer, scheduler=None,
        use_amp=False, clip_grad=0, use_cat=joint, amp_cm=nullcontext, T=0.5, p_cutoff=0.95, use_hard_label=True,
        lambda_u=1.0, ce_loss=cross_entropy, consistency_loss=consistency, log_dict={},
        compute_prob=lambda logits: torch.softmax(logits, dim=-1), registered_hook=lambda name: False,
        process_out_dict=lambda **found: found,
        process_log_dict=lambda **found: found,
    )  # fmt: skip
    run.call_hook = lambda function, hook, *arguments, **named: calls[function](run, *arguments, **named)
    sys.modules["semilearn.core.algorithmbase"] = algorithm = types.ModuleType("semilearn.core.algorithmbase")
    algorithm.AlgorithmBase = object  # type: ignore[attr-defined]
    registry = types.SimpleNamespace(register=lambda name: lambda kind: kind)
    utils.ALGORITHMS = registry
    shared: Any = sys.modules["semilearn.algorithms.hooks"]
    shared.PseudoLabelingHook, shared.FixedThresholdingHook = type(pseudo_label), type(masking)
    step = find("algorithms.fixmatch.fixmatch", "FixMatch").train_step

    start, times = _resident(), []
    average.before_run(run)
    model.train()
    began = time.process_time()
    for first, second in zip(loader(labeled, size), loader(unlabeled, size * ratio), strict=True):
        run.out_dict, run.log_dict = step(run, first["x_lb"], first["y_lb"], second["x_ulb_w"], second["x_ulb_s"])
        update.after_train_step(run)
        average.after_train_step(run)
        times.append(time.process_time() - began)
        began = time.process_time()
    return _figures(times, start)


def ours(
    steps: int = 4,
    size: int = 64,
    ratio: int = 7,
    forward_pass: str = "split",
    channels_last: bool = True,
    precision: str = "bf16-mixed",
) -> dict[str, float]:
    """The same step as ``zoo fit`` makes it, with every callback of a run.

    Args:
        steps: steps, the first of which is not counted.
        size: labeled images of a step.
        ratio: unlabeled images per labeled one.
        forward_pass: see :class:`zoo.semi_supervised.base.SemiSupervised`.
        channels_last: memory format of the network.
        precision: the Trainer's.
    """
    from functools import partial

    from lightning.pytorch import Callback

    from datamodules import ArraySource, SemiSupervisedData
    from zoo.core.network import Network
    from zoo.semi_supervised.fixmatch import FixMatch

    pixels = images(5000)
    labels = torch.arange(5000) % CLASSES
    source = ArraySource(
        CLASSES, images=pixels, labels=labels, test_images=pixels[:100], test_labels=labels[:100], size=32, channels=3
    )
    data = SemiSupervisedData(
        source, labels_per_class=20, batch_size=size, unlabeled_ratio=ratio, steps=steps, val_size=0
    )
    torch.manual_seed(0)
    method = FixMatch(
        network=partial(Network, backbone="wrn_28_2", channels_last=channels_last),
        num_classes=CLASSES,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, weight_decay=5e-4, nesterov=True),
        forward_pass=forward_pass,
    )
    times: list[float] = []

    class Clock(Callback):
        """The CPU time from one step's end to the next: loading, views, step, update, average."""

        def on_train_start(self, *_: Any) -> None:
            self.began = time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            times.append(time.process_time() - self.began)
            self.began = time.process_time()

    start = _resident()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, precision=precision)
        trainer.callbacks.append(Clock())  # type: ignore[attr-defined]
        trainer.fit(method, data)
        throughput = json.loads((Path(folder) / "metrics.json").read_text())["throughput"]
    return _figures(times, start) | {"data_wait": round(throughput["data_wait"], 5)}
