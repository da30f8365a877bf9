"""Domains whose classes differ, in order or at all; further test domains; domains of texts."""

import functools

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

import zoo
from datamodules import ArraySource, Blobs, DomainData, GeneralizationData, KnownClasses
from datamodules.sources import DomainFolders, DomainLists, TextTable
from zoo.core.errors import UserError
from zoo.core.network import Network


def named(*names, per_class=6, shade=None):
    """Images of 8 × 8 that show the number of their class's *name*: its place in the alphabet."""
    labels = torch.arange(len(names)).repeat(per_class)
    shades = torch.tensor([ord(names[label][0]) for label in labels.tolist()], dtype=torch.uint8)
    images = shades.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    return ArraySource(len(names), images=images, labels=labels, size=8, classes=names)


def ready(source, target, **kwargs):
    data = DomainData(source, target, **{"batch_size": 4, "val_size": 0, **kwargs})
    data.prepare_data()
    data.setup()
    return data


def labels_by_name(samples):
    """First letter of the class that an image shows → the labels it has."""
    shades = samples.images[:, 0, 0, 0].tolist()
    return {chr(shade): label for shade, label in sorted(set(zip(shades, samples.labels.tolist(), strict=True)))}


# Sets of classes -----------------------------------------------------------------------------------------------------


def test_another_order_is_refused_or_aligned():
    source, target = named("ant", "bee", "cow"), named("cow", "ant", "bee")
    with pytest.raises(UserError, match=r"class 0 is 'ant' in .* but 'cow' in .* With align_classes: true"):
        ready(source, target)
    data = ready(source, target, align_classes=True)
    assert labels_by_name(data.test_dataloader()["test"].dataset) == {"a": 0, "b": 1, "c": 2}
    assert labels_by_name(data._train(data.target)) == {"a": 0, "b": 1, "c": 2}
    assert data.classes == ("ant", "bee", "cow")


def test_several_sources_are_aligned_too():
    data = ready([named("ant", "bee"), named("bee", "ant")], named("bee", "ant"), align_classes=True)
    assert labels_by_name(data.roles["source"].samples) == {"a": 0, "b": 1}
    with pytest.raises(UserError, match="lacks 'cow'"):
        ready([named("ant", "bee", "cow"), named("ant", "bee")], named("ant", "bee"), setting="partial")


def test_other_classes_are_named_with_the_setting_they_have():
    three, two = named("ant", "bee", "cow"), named("ant", "bee")
    with pytest.raises(UserError, match=r"has 3 classes, but .* lacks 'cow'; if that is meant, setting: partial"):
        ready(three, two)
    with pytest.raises(UserError, match=r"has 2 classes, but .* lacks 'cow'; if that is meant, setting: open"):
        ready(two, three)
    with pytest.raises(UserError, match=r"lacks 'bee'; .* lacks 'Bee'. Did you mean 'Bee'\?"):
        ready(two, named("ant", "Bee"))
    with pytest.raises(UserError, match=r"setting='partail' must be one of .* Did you mean 'partial'"):
        DomainData(three, two, setting="partail")


def test_partial():
    data = ready(named("ant", "bee", "cow"), named("cow", "bee"), setting="partial", target_val_size=0.5)
    assert data.num_classes == 3
    assert labels_by_name(data._train(data.target)) == {"b": 1, "c": 2}
    assert set(data.val_dataloader()["oracle"].dataset.labels.tolist()) <= {1, 2}
    with pytest.raises(UserError, match="has also 'dog', which"):
        ready(named("ant", "bee"), named("ant", "dog"), setting="partial")


def test_open():
    target = named("dog", "cow", "emu", "ant")
    data = ready(named("ant", "cow"), target, setting="open", target_val_size=8)
    assert data.num_classes == 2
    assert labels_by_name(data._test(target)) == {"a": 0, "c": 1, "d": 2, "e": 2}
    assert len(data.val_dataloader()["oracle"].dataset) == 8
    batch, _, _ = next(iter(data.train_dataloader()))
    assert int(batch["target"]["hidden_label"].max()) <= 2
    assert "label" not in batch["target"]
    with pytest.raises(UserError, match="has also 'fox', which"):
        ready(named("ant", "fox"), target, setting="open")
    with pytest.raises(UserError, match=r"the target has further classes, but all of .* are classes of"):
        ready(named("ant", "bee"), named("ant", "bee"), setting="open")


def test_universal():
    target = named("dog", "cow", "emu", "ant")
    data = ready(named("ant", "bee", "cow"), target, setting="universal", target_val_size=8)
    assert data.num_classes == 3
    assert labels_by_name(data.roles["source"].samples) == {"a": 0, "b": 1, "c": 2}
    assert labels_by_name(data._test(target)) == {"a": 0, "c": 2, "d": 3, "e": 3}
    with pytest.raises(UserError, match=r"in the setting 'universal' the target has further classes, but all of"):
        ready(named("ant", "bee"), named("ant"), setting="universal")
    with pytest.raises(UserError, match=r"but all of .* are classes of"):
        ready(named("ant"), named("ant", "bee"), setting="universal")
    with pytest.raises(UserError, match=r"but none of .* are classes of"):
        ready(named("ant", "bee"), named("cow", "dog"), setting="universal")


def test_known_classes_make_both_settings_of_one_set():
    data = ready(Blobs(num_classes=4), KnownClasses(Blobs(num_classes=4, seed=1), known=[3, 1]), setting="partial")
    assert data._train(data.target).labels.unique().tolist() == [1, 3]
    data = ready(KnownClasses(Blobs(num_classes=4), known=[3, 1]), Blobs(num_classes=4, seed=1), setting="open")
    assert data._train(data.target).labels.unique().tolist() == [0, 1, 2]


def test_one_class_is_warned_of():
    with pytest.warns(UserWarning, match="has one class only, 'bee'"):
        ready(named("ant", "bee"), named("bee"), setting="partial")


# What methods meet ---------------------------------------------------------------------------------------------------


def small(method, num_classes=2):
    network = functools.partial(Network, backbone="lenet", in_channels=1)
    return method(network=network, num_classes=num_classes, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))


def trainer(folder):
    return L.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )


def large(*names):
    labels = torch.arange(len(names)).repeat(6)
    images = (labels * 40).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    return ArraySource(len(names), images=images, labels=labels, size=28, classes=names)


def test_methods_for_equal_classes_are_refused_elsewhere(tmp_path):
    data = DomainData(large("ant", "bee"), large("ant", "bee", "cow"), batch_size=2, steps=1, setting="open")
    with pytest.raises(UserError, match=r"DANN is made for the setting 'closed', not for 'open'.* `settings` name it"):
        trainer(tmp_path).fit(small(zoo.DANN), data)


@pytest.mark.parametrize(("setting", "target"), [("open", ("ant", "bee", "cow")), ("universal", ("ant", "cow"))])
def test_open_sets_are_measured_as_such(tmp_path, setting, target):
    data = DomainData(
        large("ant", "bee"), large(*target), batch_size=2, steps=1, setting=setting, unknown_threshold=1.0
    )
    run, method = trainer(tmp_path), small(zoo.SourceOnly)
    run.fit(method, data)
    assert {"val/accuracy", "val/known_accuracy", "oracle/hos", "oracle/unknown_accuracy"} <= set(run.callback_metrics)
    assert "val/hos" not in run.callback_metrics
    (found,) = run.test(method, data, verbose=False)
    assert found["test/unknown_accuracy"] == 1  # nothing is as probable as 1
    assert found["test/known_accuracy"] == found["test/hos"] == 0
    with pytest.raises(UserError, match="goes with setting: open"):
        DomainData(Blobs(), Blobs(), unknown_threshold=0.5)


def test_further_domains_are_tested_by_name(tmp_path):
    tests = {"dark": large("bee", "ant"), "same": large("ant", "bee")}
    sources = [large("ant", "bee"), large("ant", "bee")]
    data = GeneralizationData(sources, large("ant", "bee"), 4, steps=1, tests=tests, align_classes=True)
    run = trainer(tmp_path)
    run.test(small(zoo.SourceOnly), data, verbose=False)
    found = run.callback_metrics
    assert {"test/accuracy", "test/dark/accuracy", "test/same/accuracy"} <= set(found)
    assert found["test/same/accuracy"] == found["test/accuracy"]
    assert data._test(tests["dark"]).columns["domain"].unique().tolist() == [3]
    with pytest.raises(UserError, match="a name is not empty and has no slash"):
        DomainData(Blobs(), Blobs(), tests={"a/b": Blobs()})


def test_configs_can_say_it():
    parser = ArgumentParser()
    parser.add_subclass_arguments(DomainData, "data")
    blobs = {"class_path": "Blobs"}
    init = {"source": [blobs], "target": blobs, "tests": {"far": blobs}, "setting": "partial", "target_val_size": 0}
    parsed = parser.parse_object({"data": {"class_path": "datamodules.DomainData", "init_args": init}})
    data = parser.instantiate_classes(parsed).data
    assert list(data.tests) == ["far"]
    assert isinstance(data.tests["far"], Blobs)


# Labels of the target ------------------------------------------------------------------------------------------------


@pytest.fixture
def lists(tmp_path):
    """A source in folders, and images of the target whose list gives them labels; the labels can be changed."""
    for name, shade in (("ant", 50), ("bee", 200)):
        for domain, number in (("art", 4), ("web", 6)):
            folder = tmp_path / domain / (name if domain == "art" else "all")
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                Image.new("L", (8, 8), shade + i).save(folder / f"{name} {i}.png")
    images = sorted(path.relative_to(tmp_path) for path in (tmp_path / "web").rglob("*.png"))

    def label(labels):
        rows = [f"{path} {label}\n" for path, label in zip(images, labels, strict=True)]
        (tmp_path / "web.txt").write_text("".join(rows))
        source = DomainFolders(str(tmp_path), "art", size=8, channels=1)
        target = DomainLists(str(tmp_path), "web", list_file="web.txt", size=8, channels=1, classes=("ant", "bee"))
        return DomainData(source, target, batch_size=4, steps=4, val_size=0.25)

    return label


def test_labels_of_the_target_never_reach_training(lists):
    torch.manual_seed(0)
    seen = []
    for labels in ([0] * 6 + [1] * 6, torch.randint(0, 2, (12,)).tolist()):
        data = lists(labels)
        data.prepare_data()
        data.setup("fit")
        batches = [data.on_after_batch_transfer(batch, 0) for batch, _, _ in data.train_dataloader()]
        for batch in batches:
            assert "label" not in batch["target"]
        seen.append([(batch["target"].pop("hidden_label"), batch) for batch in batches])
    changed = False
    for (truth, batch), (poisoned, other) in zip(*seen, strict=True):
        changed |= not torch.equal(truth, poisoned)
        for role in batch:
            assert all(torch.equal(batch[role][key], other[role][key]) for key in batch[role])
    assert changed


def test_a_target_without_labels_can_be_adapted_to_and_predicted(lists, tmp_path):
    lists([0] * 12)
    source = DomainFolders(str(tmp_path), "art", size=8, channels=1)
    target = DomainFolders(str(tmp_path), "web", size=8, channels=1, classes=None)
    for picture in (tmp_path / "web" / "all").iterdir():
        picture.rename(tmp_path / "web" / picture.name)
    (tmp_path / "web" / "all").rmdir()
    data = ready(source, target, val_size=0.25)
    assert len(data.roles["target"].samples) == 12
    assert set(data.val_dataloader()) == {"val"}
    assert len(data.prediction_set()) == 12
    with pytest.raises(UserError, match=r"no test sample of DomainFolders \(web\) has a label.* predict"):
        data.test_dataloader()
    with pytest.raises(UserError, match="has no classes; a source needs labels"):
        ready(target, source)


def test_all_of_the_target_is_learnt_from_where_none_is_held_out(lists):
    data = lists([0] * 6 + [1] * 6)
    data.target_val_size = 0
    data.setup("fit")
    assert len(data.roles["target"].samples) == 12
    assert len(data.parts["val 0"]) == 2
    with pytest.raises(UserError, match="target_val_size=-1 must be a number"):
        DomainData(Blobs(), Blobs(), target_val_size=-1)
    with pytest.raises(UserError, match="target_val_size=200 leaves nothing"):
        ready(Blobs(), Blobs(samples=30), target_val_size=200)


def test_a_domain_without_samples_is_named():
    empty = ArraySource(2, images=torch.zeros(0, 1, 8, 8).byte(), labels=torch.zeros(0).long(), size=8)
    with pytest.raises(UserError, match="ArraySource has no train samples"):
        ready(Blobs(num_classes=2, size=8), empty)


# Texts ---------------------------------------------------------------------------------------------------------------

ROWS = [
    ("books", "good", "a fine fine read"),
    ("books", "bad", "a dull dull read"),
    ("books", "good", "fine pages read"),
    ("books", "bad", "dull pages read"),
    ("films", "good", "a fine fine film"),
    ("films", "bad", "a dull dull film"),
    ("films", "good", "fine scenes film"),
    ("films", "bad", "dull scenes film"),
]


@pytest.fixture(params=["csv", "jsonl"])
def table(tmp_path, request):
    file = tmp_path / f"reviews.{request.param}"
    if request.param == "csv":
        file.write_text("product,label,text\n" + "".join(f"{d},{y},{x}\n" for d, y, x in ROWS * 2))
    else:
        import json

        file.write_text("".join(json.dumps({"text": x, "label": y, "product": d}) + "\n" for d, y, x in ROWS * 2))
    return str(file)


def domain(table, name, **kwargs):
    return TextTable(table, domain_column="product", domain=name, test_fraction=0.5, **{"max_length": 4, **kwargs})


def test_a_table_is_read_by_domain(table):
    books = domain(table, "books")
    assert (len(books.train()), len(books.test())) == (4, 4)
    assert books.name == "TextTable (books)"
    assert all("film" not in text for texts, _ in books.read().values() for text in texts)
    with pytest.raises(
        FileNotFoundError, match=r"no row with 'book' in .* it has 'books', 'films'. Did you mean 'books'"
    ):
        domain(table, "book").prepare()
    with pytest.raises(UserError, match="go together"):
        TextTable(table, domain="books")
    with pytest.raises(UserError, match="'kind'"):
        TextTable(table, domain_column="kind", domain="books").prepare()


def test_text_domains_get_one_vocabulary(table):
    books, films = domain(table, "books"), domain(table, "films")
    assert books.tokenizer.fingerprint != films.tokenizer.fingerprint
    data = ready(books, films, batch_size=2)
    assert books.tokenizer.fingerprint == films.tokenizer.fingerprint
    assert {"read", "film"} <= set(books.tokenizer.words)
    word = books.tokenizer.words["fine"]
    for role in ("source", "target"):
        samples = data.roles[role].samples
        assert torch.equal((samples.tokens == word).any(dim=1), samples.labels == 1)  # "good" texts are fine ones
    vocabulary = data.state_dict()
    again = ready(domain(table, "books"), domain(table, "films"), batch_size=2)
    again.load_state_dict(vocabulary)  # the same in every run


def test_the_vocabulary_of_generalization_knows_nothing_of_the_target(table):
    books, films = domain(table, "books"), domain(table, "films")
    data = GeneralizationData(books, films, batch_size=2, val_size=0)
    data.setup("fit")
    assert "film" not in films.tokenizer.words
    assert books.tokenizer.fingerprint == films.tokenizer.fingerprint


def test_vocabularies_of_other_kinds_are_refused(table):
    with pytest.raises(UserError, match=r"TextTable \(books\) and TextTable \(films\) have different vocabularies"):
        ready(domain(table, "books"), domain(table, "films", tokenizer="bpe"), batch_size=2)


def test_texts_of_other_lengths_are_named(table):
    """A batch of both domains, or of two sources, has rows of one length."""
    with pytest.raises(UserError, match=r"\(books\) has texts of max_length=4, but TextTable \(films\) of 16"):
        ready(domain(table, "books"), domain(table, "films", max_length=16), batch_size=2)


def test_texts_without_labels_can_be_the_target(table):
    data = ready(domain(table, "books"), domain(table, "films", label=None), batch_size=2, val_size=0.5)
    assert data.roles["target"].samples.labels.tolist() == [-1] * 8
    assert set(data.val_dataloader()) == {"val"}
    assert len(data.prediction_set()) == 8
