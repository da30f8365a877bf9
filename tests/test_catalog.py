import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import pytest

import zoo
from zoo import catalog
from zoo.__main__ import main

HEAVY = ("torch", "lightning", "numpy", "yaml", "rich", "jsonargparse")


def test_ast_and_import_agree_on_every_card():
    for name, entry in catalog.methods().items():
        cls = getattr(zoo, name)
        fields = {field.name for field in dataclasses.fields(cls.card)}
        assert {key: getattr(entry, key) for key in fields} == dataclasses.asdict(cls.card)
        assert entry.family == entry.path.parent.name
        assert cls.__module__ == entry.module
        assert entry.summary


def test_every_imported_method_with_a_card_is_listed():
    def subclasses(cls):
        return {child for direct in cls.__subclasses__() for child in {direct, *subclasses(direct)}}

    public = {c.__name__ for c in subclasses(zoo.Method) if "card" in vars(c) and c.__module__.startswith("zoo.")}
    assert public == set(catalog.methods())


def test_a_new_file_is_found_without_being_registered(tmp_path):
    folder = tmp_path / "zoo" / "distillation"
    folder.mkdir(parents=True)
    card = 'card = Card(title="T", year=2024, paper="arXiv:1", family="distillation", roles=("labeled",))'
    public = f'class New(Method):\n    """Idea."""\n\n    {card}\n'
    (folder / "new.py").write_text(f"{public}\nclass _Hidden(New):\n    {card}\n")
    (folder / "base.py").write_text("class Base(Method):\n    pass\n")
    (folder / "_private.py").write_text(f"class Private(Method):\n    {card}\n")
    found = catalog.methods(tmp_path / "zoo")
    assert list(found) == ["New"]
    assert found["New"].module == "zoo.distillation.new"
    assert found["New"].roles == ("labeled",)


def test_two_methods_of_one_name_are_refused(tmp_path):
    for family in ("distillation", "semi_supervised"):
        (tmp_path / family).mkdir()
        text = 'class Same(Method):\n    card = Card(title="T", year=1, paper="", family="x", roles=())\n'
        (tmp_path / family / "same.py").write_text(text)
    with pytest.raises(ValueError, match="Same is defined in both"):
        catalog.methods(tmp_path)


def test_inherited_arguments_are_those_of_the_signatures():
    shown = {argument.name: argument for argument in catalog.arguments(catalog.methods()["FixMatch"])}
    assert shown["network"].owner == "Method"
    assert shown["network"].default is None
    assert shown["decay_norms_and_biases"].default == "False"
    assert shown["unlabeled_weight"].owner == "FixMatch"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  class_path: FixMatch\n", True),
        ("model:\n  class_path: zoo.FixMatch\n", True),
        ("model: FixMatch\n", True),
        ("model:\n  class_path: FixMatchX\n", False),
        ("model:\n  class_path: MyFixMatch\n", False),
        ("# FixMatch\n", False),
    ],
)
def test_configs_of_a_method(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path / "nowhere" / "zoo")
    (tmp_path / "configs" / "x").mkdir(parents=True)
    (tmp_path / "configs" / "x" / "a.yaml").write_text(text)
    assert bool(catalog.configs("FixMatch")) is expected
    assert len(catalog.configs()) == 1


def test_newest_checkpoints_come_first_and_belong_to_their_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, (run, method) in enumerate([("a", "FixMatch"), ("b", "DANN"), ("c", "FixMatch")]):
        path = tmp_path / "runs" / run / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (1000 + age, 1000 + age))
        (tmp_path / "runs" / run / "config.yaml").write_text(f"model:\n  class_path: zoo.{method}\n")
    assert [path.parts[1] for path in catalog.checkpoints()] == ["c", "b", "a"]
    assert [path.parts[1] for path in catalog.checkpoints("FixMatch")] == ["c", "a"]
    assert catalog.run_config(tmp_path / "runs/a/checkpoints/last.ckpt") == tmp_path / "runs/a/config.yaml"


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["list"], ["list", "--json"], ["show", "FixMatch"], ["fti"]]
)
def test_front_door_imports_nothing_heavy(argv):
    code = f"""
        import sys
        from zoo.__main__ import main
        main({argv!r})
        heavy = [name for name in {HEAVY!r} if name in sys.modules]
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)


def test_list(capsys):
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(catalog.methods())
    assert main(["list", "--family", "semi_supervised"]) == 0
    out = capsys.readouterr().out
    assert "FixMatch" in out
    assert "DANN" not in out


def test_show(capsys):
    assert main(["show", "FixMatch"]) == 0
    out = capsys.readouterr().out
    assert "arXiv:2001.07685" in out
    assert "unlabeled_weight" in out
    assert "decay_norms_and_biases: bool = False  [Method]" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fti"], "no command 'fti'. Did you mean 'fit'?"),
        (["show", "FixMach"], "Did you mean 'FixMatch'?"),
        (["list", "--family", "distilation"], "Did you mean 'distillation'?"),
    ],
)
def test_misspelt(argv, said, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_help_names_every_command(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "list", "show", "pipeline", "benchmark", "export"):
        assert f"  {command} " in out
