"""Rebuilding a trained method asks other libraries for the architecture and never for weights."""

import json
from functools import partial

import pytest
import torch

import zoo
from zoo import hub


def saved_and_loaded(backbone, folder, between):
    """A method trained from the library's weights, saved, then loaded after ``between()``."""
    torch.manual_seed(0)
    recipe = partial(zoo.Network, backbone=backbone, weights="pretrained")
    method = zoo.Supervised(network=recipe, num_classes=3)
    method.configure_model()
    hub.save_pretrained(method.eval(), folder)
    between()
    torch.manual_seed(1)
    return method, zoo.load(folder)


def test_text_encoder(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**settings, intermediate_size=24, max_position_embeddings=20)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")

    def without_weights():
        files = list((tmp_path / "bert").glob("*.safetensors"))
        assert files
        for file in files:
            file.unlink()
        monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)

    method, loaded = saved_and_loaded(f"hf:{tmp_path / 'bert'}", tmp_path / "saved", without_weights)
    x = {"input_ids": torch.randint(1, 30, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    assert torch.equal(loaded(x), method(x))


def test_image_tower(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8}
    tower = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "labelight-load.json").write_text(
        json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": tower})
    )
    open_clip.add_model_config(tmp_path / "labelight-load.json")
    create, asked = open_clip.create_model, []

    def create_model(name, pretrained=None, **arguments):
        asked.append((pretrained, arguments.get("pretrained_text"), arguments.get("pretrained_image", False)))
        return create(name, pretrained=None, **arguments)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["first", "mine"])
    method, loaded = saved_and_loaded("open_clip:labelight-load/mine", tmp_path / "saved", lambda: None)
    assert asked == [("mine", False, False), (None, False, False)]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), method(x))
