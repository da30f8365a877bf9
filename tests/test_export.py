import sys
from functools import partial

import pytest
import torch
from torch import nn

import zoo
from zoo import export as e


@pytest.fixture
def method():
    torch.manual_seed(0)
    made = zoo.FixMatch(network=partial(zoo.Network, backbone="lenet", in_channels=1), num_classes=4)
    made.configure_model()
    with torch.no_grad():
        for parameter in made.teacher.parameters():
            parameter.add_(0.01)
    return made.eval()


def test_safetensors_is_what_load_reads(method, tmp_path):
    assert e.export(method, "safetensors", tmp_path) == tmp_path
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(zoo.load(tmp_path)(x), method(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_export_gives_the_predictors_outputs(method, tmp_path, dynamic):
    path = e.export(method, "torch_export", tmp_path, (1, 28, 28), dynamic)
    program = torch.export.load(path).module()
    x = torch.randn(7 if dynamic else 1, 1, 28, 28)
    assert torch.allclose(program(x), method(x), atol=1e-5)
    assert not torch.allclose(program(x), method.network(x), atol=1e-5)


def test_onnx_gives_the_predictors_outputs(method, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = e.export(method, "onnx", tmp_path, (1, 28, 28), dynamic_batch=True)
    session = runtime.InferenceSession(str(path))
    x = torch.randn(3, 1, 28, 28)
    (logits,) = session.run(["logits"], {"image": x.numpy()})
    assert torch.allclose(torch.from_numpy(logits), method(x), atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_wrong_outputs_are_not_written(method, tmp_path, monkeypatch):
    monkeypatch.setitem(e._FORMATS, "torch_export", (e._write_program, lambda _: lambda x: method(x) + 1, "model.pt2"))
    with pytest.raises(e.ExportError, match="largest difference 1"):
        e.export(method, "torch_export", tmp_path, (1, 28, 28))
    assert list(tmp_path.iterdir()) == []


def test_missing_extras_are_named(method, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(e.ExportError, match=r"labelight\[onnx\]"):
        e.export(method, "onnx", tmp_path, (1, 28, 28))


def test_a_network_that_cannot_be_traced_is_named(method, tmp_path, monkeypatch):
    class Branching(nn.Module):
        def forward(self, x):
            return x.sum() if x.sum().item() > 0 else x

    monkeypatch.setattr(type(method), "predictor", Branching())
    with pytest.raises(e.ExportError, match="Branching cannot be traced"):
        e.export(method, "torch_export", tmp_path, (1, 28, 28))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "pickle"}, "must be one of"),
        ({"format": "onnx"}, "needs the shape"),
        ({"format": "onnx", "input_shape": (28, 28)}, "channels, height, width"),
    ],
)
def test_mistakes(method, tmp_path, arguments, message):
    with pytest.raises(e.ExportError, match=message):
        e.export(method, directory=tmp_path, **arguments)


def test_shape_comes_from_the_configuration_or_the_command_line():
    config = {"init_args": {"network": {"init_args": {"in_channels": 1, "image_size": 28}}}}
    assert e._shape(None, None, config) == (1, 28, 28)
    assert e._shape(None, 32, config) == (1, 32, 32)
    assert e._shape("3x8x9", None, config) == (3, 8, 9)
    assert e._shape(None, None, {}) is None
    with pytest.raises(e.ExportError, match="such as 3,32,32"):
        e._shape("3,a", None, {})


def test_main(method, tmp_path, capsys):
    from zoo.__main__ import main

    method.save_pretrained(tmp_path / "saved")
    arguments = ["export", str(tmp_path / "saved"), "--format", "torch_export", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--image_size", "28"]) == 0
    assert (tmp_path / "out/model.pt2").is_file()
    assert main(arguments) == 2  # nothing says how large an image is
    assert "needs the shape" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "savde"), "--output", "x"]) == 2
    assert "Did you mean 'saved'" in capsys.readouterr().err


def test_text_networks_go_by_safetensors(tmp_path):
    text = partial(zoo.Network, backbone="bag_of_words", arguments={"vocabulary": 50, "width": 8})
    made = zoo.Supervised(network=text, num_classes=2)
    made.configure_model()
    with pytest.raises(e.ExportError, match="a text network goes by safetensors"):
        e.export(made, "torch_export", tmp_path, (1, 28, 28), True)
