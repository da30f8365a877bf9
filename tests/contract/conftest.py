"""How a config is made small enough for a few steps in a second, without changing what is tested."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from datamodules.tokenizer import build

# Sources that need a download, or seconds to read, are replaced by seeded blobs of the same shape.
SHAPES = {
    "MNIST5k": (10, 28, 1),
    "Optdigits": (10, 28, 1),
    "FashionMNIST": (10, 28, 1),
    "CIFAR10": (10, 32, 3),
    "CIFAR100": (100, 32, 3),
    "SVHN": (10, 32, 3),
    "STL10": (10, 96, 3),
}
TEXTS = {"Sentiment": 2}  # replaced by synthetic texts of as many classes
TEXT_NETS = ("text_cnn", "bag_of_words", "t5")
SAMPLES = 600
# Methods that mix samples of a batch or draw noise: two ranks cannot equal one, they must only agree with each other.
RANDOM: set[str] = {
    "CRMatch",
    "ContinuedPretraining",
    "DMixMatch",
    "DST",
    "DecoupledMixup",
    "ITTA",
    "InterDomainMixup",
    "MLDG",
    "MetaDMoE",
    "MetaPseudoLabels",
    "MixMatch",
    "MixStyle",
    "NoisyStudent",
    "ReMixMatch",
    "VAT",
}


def small_source(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A stand-in for ``source``; ``folder`` takes files that it reads."""
    name = source["class_path"].rpartition(".")[2]
    if name == "DigitSorting":
        return {**source, "init_args": {**source.get("init_args", {}), "samples": SAMPLES, "test_samples": 20}}
    if name == "SimulatedCandidates":
        return source
    if name == "DigitScenes":
        return {**source, "init_args": {**source.get("init_args", {}), "train_scenes": 40, "test_scenes": 8}}
    if "source" in source.get("init_args", {}):  # one around another one
        arguments = {**source["init_args"], "source": small_source(source["init_args"]["source"], folder)}
        if "teacher" in arguments:
            arguments["teacher"] = weak_labels(folder)
        return {**source, "init_args": arguments}
    if name in TEXTS:
        return {"class_path": "Phrases", "init_args": {"num_classes": TEXTS[name], "samples": SAMPLES}}
    classes, size, channels = SHAPES[name]
    arguments = {"num_classes": classes, "size": size, "channels": channels, "samples": SAMPLES, "test_samples": 100}
    return {"class_path": "Blobs", "init_args": arguments}


def tiny_encoder(folder: Path) -> str:
    """A text encoder of transformers with random weights; without dropout, of which every rank has its own draw."""
    settings = {"model_type": "bert", "vocab_size": 128, "hidden_size": 16, "intermediate_size": 24}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    (folder / "config.json").write_text(
        json.dumps(settings | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    return f"hf:{folder}"


def small_network(network: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same kind of network without downloaded weights."""
    arguments = dict(network.get("init_args", {}))
    if str(arguments.get("backbone")).startswith("hf:"):
        return {**network, "init_args": {**arguments, "backbone": tiny_encoder(folder), "weights": None}}
    if arguments.pop("weights", None) is not None:
        arguments["backbone"] = "tiny_cnn"
        arguments["in_channels"] = 1
        arguments.pop("resize", None)
    return {**network, "init_args": arguments}


def weak_labels(folder: Path, classes: int = 10) -> str:
    """A supervisor's soft labels for every sample of the stand-in."""
    path = folder / "weak_labels.safetensors"
    probabilities = torch.randn(SAMPLES, classes, generator=torch.Generator().manual_seed(0)).softmax(1)
    save_file({"index": torch.arange(SAMPLES), "probabilities": probabilities}, path)
    return str(path)


def lexicon(folder: Path) -> str:
    """Valences of the words that a stand-in's two classes have of their own."""
    path = folder / "lexicon.txt"
    path.write_text("".join(f"own{label}x{n}\t{2 * label - 1}\n" for label in range(2) for n in range(8)))
    return str(path)


def earlier_round(folder: Path, number: int) -> str:
    """What a network of two classes said of every training sample of all domains."""
    path = folder / f"round_{number}.safetensors"
    index = torch.arange(SAMPLES * 3)
    generator = torch.Generator().manual_seed(number)
    save_file({"index": index, "probabilities": torch.randn(len(index), 2, generator=generator).softmax(1)}, path)
    return str(path)


def vocabulary(folder: Path, model: dict[str, Any]) -> str:
    """A tokenizer of the words that a model's prompts and classes have."""
    texts = [*model["class_names"], *model.get("templates", []), *itertools.chain(*model.get("groups", []))]
    return str(build(2 * texts).save(folder / "tokenizer.json"))


@pytest.fixture
def small(tmp_path: Path) -> Callable[[Path], Path]:
    """The same config on synthetic data, with small batches and without downloaded weights, in a new file."""

    def shrink(path: Path) -> Path:
        config = yaml.safe_load(path.read_text())
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        for key in {"source", "target"} & data.keys():
            several = isinstance(data[key], list)
            made = [small_source(source, tmp_path) for source in (data[key] if several else [data[key]])]
            data[key] = made if several else made[0]
        domains = len(data["source"]) if isinstance(data.get("source"), list) else 1
        data |= {"steps": 4, "batch_size": 8 if domains == 1 else 2 * domains, "val_size": 20}
        data.pop("num_workers", None)
        for few in {"num_labels", "supervisor_labels"} & data.keys():
            data[few] = 200
        if data.get("role") == "student":
            data["weak_labels"] = weak_labels(tmp_path, data["source"]["init_args"].get("num_classes", 10))
        source = data["source"] if isinstance(data.get("source"), dict) else {}
        for function in [*data.get("functions", []), *source.get("init_args", {}).get("functions", [])]:
            if function["class_path"] == "Lexicon":
                function["init_args"]["path"] = lexicon(tmp_path)
        if "rounds" in data:
            data["rounds"] = [earlier_round(tmp_path, number) for number in range(2)]
        if "network" in model:
            model["network"] = small_network(model["network"], tmp_path)
        if str(model.get("tokenizer")).endswith("tokenizer.json"):
            model["tokenizer"] = vocabulary(tmp_path, model)
        if "teacher" in model:
            model["allow_untrained_teacher"] = True
        if "experts" in model:
            model["allow_untrained_experts"] = True
            data["batch_size"] *= 2  # every domain has two kinds of samples, on two ranks, too
        file = tmp_path / path.name
        file.write_text(yaml.safe_dump(config))
        return file

    return shrink


@pytest.fixture
def without_batch_norm() -> Callable[[str], None]:
    """Replace the networks' backbones in a config by one with LayerNorm."""

    def replace(file: str) -> None:
        config = yaml.safe_load(Path(file).read_text())
        model = config["model"]["init_args"]
        networks = [model[key] for key in sorted({"network", "teacher"} & model.keys())] + model.get("experts", [])
        for arguments in (network["init_args"] for network in networks):
            if "backbone" not in arguments:
                continue  # language models have LayerNorm
            if arguments.get("backbone") in TEXT_NETS or str(arguments.get("backbone")).startswith("hf:"):
                arguments["dropout"] = 0.0  # they have no norm, but every rank has its own draw
                continue
            if arguments.get("backbone") == "tiny_mlp":
                continue  # it has LayerNorm, and no patches that must tile the image
            size = {"depth": 2, "embed_dim": 48, "class_token": False, "global_pool": "avg"}
            arguments |= {"backbone": "vit_tiny_cifar", "arguments": size}
            neck = arguments.get("neck")
            if isinstance(neck, dict) and neck["class_path"] == "Bottleneck":
                neck["init_args"] = {**neck.get("init_args", {}), "norm": False}
        if config["model"]["class_path"] == "MixStyle":
            config["model"]["init_args"]["layers"] = ["blocks.0"]
        if config["model"]["class_path"] in ("ShrinkMatch", "ShrinkSimMatch"):
            config["model"]["init_args"]["auxiliary"] = {"class_path": "MLP"}
        Path(file).write_text(yaml.safe_dump(config))

    return replace


@pytest.fixture
def draws() -> set[str]:
    """Names of the methods whose steps draw random numbers."""
    return RANDOM
