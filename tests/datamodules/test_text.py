"""Texts under every regime, and the views of them."""

import json
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

import zoo
from datamodules import (
    Blobs,
    DomainData,
    Phrases,
    SemiSupervisedData,
    Sentiment,
    SupervisedData,
    TextTable,
    WeakLabelData,
)
from datamodules.sources import KnownClasses, MergedClasses, NoisyLabels, TensorSamples, TokenSamples
from datamodules.tokenizer import build, load
from datamodules.transforms import Compose, Identity, Strong, StrongText, Weak, WordDropout
from datamodules.transforms.corpus import Corpus
from datamodules.transforms.text import delete, shuffle
from zoo.core.network import Network


def first_batch(data):
    data.prepare_data()
    data.setup("fit")
    batch, _, _ = next(iter(data.train_dataloader()))
    return data.on_after_batch_transfer(batch, 0)


def corpus(*texts, kind="words", length=8):
    tokenizer = build(list(texts) * 2, kind)  # twice: what occurs once is unknown
    return Corpus(tokenizer(texts, length), tokenizer)


def read(ids, tokenizer):
    names = {number: word for word, number in tokenizer.words.items()}
    return [" ".join(names[i] for i in row if i != tokenizer.pad) for row in ids.tolist()]


# Tokenizers ----------------------------------------------------------------------------------------------------------


def test_a_vocabulary_of_words():
    tokenizer = build(["Don't  stop, it's GREAT :-)", "don't stop it's great", "stop once"])
    assert (tokenizer.pad, tokenizer.unknown) == (0, 1)
    assert tokenizer.words.keys() == {"[PAD]", "[UNK]", "don't", "stop", "it's", "great"}  # what occurs twice
    assert tokenizer.words["stop"] == 2  # the most frequent comes first
    ids = tokenizer(["Stop, DON'T", "", "stop " * 9], 4)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [[2, 1, tokenizer.words["don't"], 0], [1, 0, 0, 0], [2, 2, 2, 2]]
    assert build(["a b a b c c"], vocabulary=4).size == 4


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_the_same_texts_give_the_same_vocabulary_and_files_keep_it(tmp_path, kind):
    texts, _ = Phrases().read()["train"]
    one = build(texts, kind)
    assert one.fingerprint == build(texts, kind).fingerprint != build(texts[:50], kind).fingerprint
    again = load(str(one.save(tmp_path / "tokenizer.json")))
    assert again.fingerprint == one.fingerprint
    assert again.special == one.special
    assert torch.equal(again(texts, 9), one(texts, 9))


def test_a_pretrained_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "good", "film"]
    inner = Tokenizer(models.WordLevel({"[x]": 6, **{word: n for n, word in enumerate(words)}}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(tmp_path)
    tokenizer = load(f"hf:{tmp_path}")
    assert tokenizer(["good film", "odd", ""], 5).tolist() == [[1, 4, 5, 2, 0], [1, 3, 2, 0, 0], [1, 2, 0, 0, 0]]
    assert tokenizer(["good film good film"], 4).tolist() == [[1, 4, 5, 2]]  # the end is not cut off
    assert tokenizer.special == (0, 1, 2)
    view = StrongText(replace=0.9, delete=0.9, shuffle=3)
    ids = tokenizer(["good film good film"] * 50, 8)
    view.learn(Corpus(ids, tokenizer))
    seen = view(ids.long())
    assert seen[:, 0].eq(1).all()
    assert (seen == 2).sum(1).eq(1).all()
    assert (seen != 0).sum(1).ge(3).all()  # at least a word
    assert not (seen == 3).any()
    kept = load(str(tokenizer.save(tmp_path / "kept" / "tokenizer.json")))
    assert (kept.fingerprint, kept.pad, kept.unknown) == (tokenizer.fingerprint, tokenizer.pad, tokenizer.unknown)
    data = SupervisedData(Phrases(tokenizer=f"hf:{tmp_path}"), batch_size=4)
    assert first_batch(data)["labeled"]["image"][:, 0].eq(1).all()


def test_tokenizers_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"neither 'words' nor 'bpe'.* Did you mean 'words'"):
        Phrases(tokenizer="word").train()
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer's JSON file"):
        Phrases(tokenizer=str(tmp_path / "x.json")).train()
    with pytest.raises(ValueError, match=r"tokenizer .*nowhere could not be fetched"):
        Phrases(tokenizer=f"hf:{tmp_path / 'nowhere'}").train()


# Views ---------------------------------------------------------------------------------------------------------------


def test_deleting_closes_up_and_leaves_a_word():
    ids = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 0, 0, 0], [9, 5, 6, 9, 0]])
    words = (ids != 0) & (ids != 9)
    drop = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 0, 0], [1, 1, 0, 1, 0]]).bool()
    assert delete(ids, drop, words, 0).tolist() == [[6, 8, 0, 0, 0], [5, 6, 0, 0, 0], [9, 6, 9, 0, 0]]
    ids = torch.where(ids == 0, 3, ids)  # another id for padding
    assert delete(ids, drop, words, 3)[0].tolist() == [6, 8, 3, 3, 3]


def test_shuffling_moves_words_a_little_and_nothing_else():
    ids = torch.arange(1, 21).repeat(200, 1)
    ids[:, 12] = 99
    ids[:, 17:] = 0
    words = (ids != 0) & (ids != 99)
    moved = shuffle(ids, 2, words)
    assert moved[:, 12].eq(99).all()
    assert moved[:, 17:].eq(0).all()
    assert torch.equal(moved.sort(1).values, ids.sort(1).values)
    rank = torch.where(words, words.cumsum(1), 0)
    place = rank.gather(1, moved.argsort(1)) - rank.gather(1, ids.argsort(1))
    assert place.abs().max() == 2
    assert torch.equal(shuffle(ids, 0, words), ids)


def test_word_dropout_keeps_order_and_share():
    known = corpus("a b c d e f g h", length=10)
    view = WordDropout(0.25)
    view.learn(known)
    ids = known.tokens.long().repeat(4000, 1)
    seen = view(ids)
    left = (seen != 0).sum(1)
    assert (left.float().mean() - 6).abs() < 0.1
    ordered = torch.where(seen == 0, 99, seen)
    rows = read(seen, known.tokenizer)
    assert all(row == " ".join(sorted(row.split())) for row in rows)
    assert torch.equal(ordered == 99, torch.arange(10) >= left[:, None])
    plain = WordDropout(0)
    plain.learn(known)
    assert torch.equal(plain(ids), ids)


def test_idf_and_scores_by_hand():
    known = corpus("the cat sat", "the dog", "the the end")
    word = known.tokenizer.words
    idf = {"the": 0.0, "cat": math.log(3), "dog": math.log(3)}
    for name, value in idf.items():
        assert known.idf[word[name]] == pytest.approx(value)
    # S: the 0, cat and sat log 3 / 3, dog log 3 / 2, end log 3 / 3
    expected = {"the": 1 / 2, "cat": 1 / 6, "sat": 1 / 6, "dog": 0.0, "end": 1 / 6}
    weights = known.replacement_weights()
    for name, value in expected.items():
        assert weights[word[name]] == pytest.approx(value * math.log(3), abs=1e-6)
    assert weights[[0, 1]].tolist() == [0, 0]


def test_what_tells_most_is_not_replaced():
    """The definition, word by word, and its consequences."""
    known = corpus("the cat sat on the mat", "the dog sat", "a cat on a hill", "the mat")
    view = StrongText(replace=0.4)
    view.learn(known)
    ids = known.tokens.long()
    words = view.words(ids)
    probability = view.replacement_probability(ids, words)
    for row, chance in zip(ids.tolist(), probability.tolist(), strict=True):
        text = [i for i in row if i]
        score = [text.count(i) / len(text) * float(known.idf[i]) for i in text]
        spare = [max(score) - s for s in score]
        expected = [min(1, 0.4 * s / (sum(spare) / len(text))) for s in spare]
        assert chance == pytest.approx([*expected, *[0] * (len(row) - len(text))], abs=1e-6)
    even = torch.full((1, 8), 0)
    even[0, :3] = known.tokenizer.words["cat"]
    assert view.replacement_probability(even, view.words(even))[0].tolist() == pytest.approx([0.4] * 3 + [0] * 5)


def test_replacements_follow_their_weights():
    known = corpus("the cat sat on the mat", "the dog sat", "a cat on a hill", "the mat")
    view = StrongText()
    view.learn(known)
    drawn = view.substitutes(torch.full((400, 100), 2))
    share = torch.bincount(drawn.flatten(), minlength=known.tokenizer.size) / drawn.numel()
    weights = known.replacement_weights()
    torch.testing.assert_close(share, weights / weights.sum(), atol=0.01, rtol=0)
    assert share[weights == 0].eq(0).all()


def test_synonyms_come_first_and_the_rest_is_drawn(tmp_path):
    known = corpus("good film plot", "fine movie plot", "great film")
    word = known.tokenizer.words
    (tmp_path / "s.txt").write_text("good\tfine\tgreat\tunheardof\nfilm\tmovie\n\ntwo words\tmovie\n")
    view = StrongText(replace=0.9, delete=0, synonyms=str(tmp_path / "s.txt"))
    view.learn(known)
    ids = torch.tensor([[word["good"], word["film"], word["plot"]]]).repeat(500, 1)
    drawn = view.substitutes(ids)
    assert set(drawn[:, 0].tolist()) == {word["fine"], word["great"]}
    assert set(drawn[:, 1].tolist()) == {word["movie"]}
    assert len(set(drawn[:, 2].tolist())) > 2
    for content, message in (("good\n", "line 1 of .* is 'good'; expected"), ("odd\tstrange\n", "no line of")):
        (tmp_path / "s.txt").write_text(content)
        with pytest.raises(ValueError, match=message):
            StrongText(synonyms=str(tmp_path / "s.txt")).learn(known)
    with pytest.raises(ValueError, match="there is no file synonyms"):
        StrongText(synonyms="nowhere").learn(known)


def test_neighbours_are_words_used_alike():
    texts = [f"the {animal} {verb} slowly" for animal in ("cat", "dog", "cow") for verb in ("eats", "sleeps", "runs")]
    known = corpus(*texts)
    table, number = known.neighbours(2)
    word = known.tokenizer.words
    assert {table[word["cat"], n].item() for n in range(2)} == {word["dog"], word["cow"]}
    assert number[word["cat"]] == 2
    assert number[0] == number[1] == 0
    view = StrongText(candidates="neighbours", nearest=2)
    view.learn(known)
    assert set(view.substitutes(torch.full((1, 99), word["cat"]))[0].tolist()) <= {word["dog"], word["cow"]}


def test_views_of_texts_have_one_draw_a_sample_and_follow_the_seed():
    source = Phrases(samples=60, length=14)
    view = Compose([Identity(), StrongText(shuffle=2)])
    view.prepare(source)
    ids = source.train()[[3] * 40]["image"]
    torch.manual_seed(1)
    one = view(ids)
    assert len(one.unique(dim=0)) > 20
    torch.manual_seed(1)
    assert torch.equal(view(ids), one)
    assert one.dtype == torch.int64
    assert one.shape == ids.shape
    per_sample = WordDropout(0.5)
    per_sample.prepare(source)
    assert per_sample.per_sample()(ids[0]).shape == ids[0].shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WordDropout(1.0), "WordDropout: probability=1.0 must be at least 0 and below 1"),
        (lambda: StrongText(replace=-0.1), "StrongText: replace=-0.1"),
        (lambda: StrongText(candidates="tf-idf"), "candidates='tf-idf' must be .* Did you mean 'tfidf'"),
        (lambda: StrongText(shuffle=-1), "shuffle=-1 must be at least 0"),
        (lambda: Phrases(vocabulary=2), "Phrases: vocabulary=2 must be at least 3"),
        (lambda: Phrases(max_length=0), "max_length=0 must be at least 1"),
        (lambda: Phrases(num_classes=5, samples=4), "Phrases: num_classes=5, samples=4"),
        (
            lambda: SemiSupervisedData(Phrases(), labels_per_class=4, batch_size=4, strong=Strong()).setup("fit"),
            "SemiSupervisedData: strong=Strong is a view of images, but Phrases has texts",
        ),
        (
            lambda: SupervisedData(Blobs(), weak=Compose([Identity(), WordDropout()])).setup("fit"),
            "weak=Compose is a view of texts, but Blobs has images",
        ),
        (
            lambda: SupervisedData(Phrases(), predict_folder=".").predict_dataloader(),
            "predict_folder reads images, but Phrases has texts",
        ),
        (lambda: DomainData(Phrases(), Blobs()).setup("fit"), "Phrases has texts, but Blobs has images"),
        (
            lambda: DomainData(Phrases(), Phrases(seed=1, vocabulary=30)).setup("fit"),
            "Phrases and Phrases have different vocabularies",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Regimes -------------------------------------------------------------------------------------------------------------


def test_phrases_are_seeded_and_can_be_learnt():
    train, test = Phrases().train(), Phrases().test()
    assert torch.equal(train.tokens, Phrases().train().tokens)
    assert not torch.equal(train.tokens, Phrases(seed=1).train().tokens)
    size = Phrases().tokenizer.size
    bags = torch.zeros(len(train), size).scatter_(1, train.tokens.long(), 1.0)[:, 2:]
    centres = torch.stack([bags[train.labels == label].mean(0) for label in range(3)])
    guess = (torch.zeros(len(test), size).scatter_(1, test.tokens.long(), 1.0)[:, 2:] @ centres.T).argmax(1)
    assert (guess == test.labels).float().mean() > 0.6


def test_texts_under_the_semi_supervised_regime():
    source = Phrases(samples=90, unlabeled_samples=40)
    data = SemiSupervisedData(source, labels_per_class=4, batch_size=4, unlabeled_ratio=3, val_size=12)
    batch = first_batch(data)
    labeled, unlabeled = batch["labeled"], batch["unlabeled"]
    assert labeled["image"].shape == (4, 16)
    assert {unlabeled[key].dtype for key in ("weak", "strong")} == {torch.int64}
    assert unlabeled["weak"].shape == unlabeled["strong"].shape == (12, 16)
    assert not torch.equal(unlabeled["weak"], unlabeled["strong"])
    assert len(data.roles["unlabeled"].samples) == 90 - 12 + 40
    torch.cat([labeled["image"], unlabeled["weak"], unlabeled["strong"]])
    (held,) = (loader for loader in data.val_dataloader().values())
    plain = data.on_after_batch_transfer(next(iter(held)), 0)
    assert torch.equal(plain["image"], source.train().tokens[plain["index"]].long())


@pytest.mark.parametrize(
    "wrap",
    [NoisyLabels, lambda source: KnownClasses(source, [0, 2]), lambda source: MergedClasses(source, [[0, 1], [2]])],
)
def test_texts_in_a_source_around_a_source(wrap):
    data = SemiSupervisedData(wrap(Phrases()), labels_per_class=4, batch_size=4, unlabeled_ratio=2, steps=2)
    batch = first_batch(data)
    assert batch["unlabeled"]["strong"].shape == (8, 16)
    assert data.state_dict() == {"vocabulary": Phrases().tokenizer.fingerprint}
    assert SupervisedData(wrap_image := NoisyLabels(Blobs())).state_dict() == {}
    assert not hasattr(wrap_image, "corpus")


def test_texts_under_the_other_regimes():
    domains = DomainData(Phrases(), Phrases(), batch_size=4, target_ratio=2)
    batch = first_batch(domains)
    assert batch["target"]["strong"].shape == (8, 16)
    halves = WeakLabelData(Phrases(), batch_size=4)
    assert first_batch(halves)["labeled"]["image"].shape == (4, 16)


def test_a_step_looks_at_its_batch_only_and_memory_is_the_ids():
    """By construction: what a step reads does not grow with the set, and the set is one table of int32."""
    for samples in (100, 1000):
        data = SemiSupervisedData(Phrases(samples=samples), labels_per_class=4, batch_size=4, unlabeled_ratio=3)
        data.setup("fit")
        role = data.roles["unlabeled"].samples
        assert role.tokens.dtype == torch.int32
        assert role.tokens.untyped_storage().nbytes() == len(role) * 16 * 4
        read = []
        original = role.images_at
        role.images_at = lambda where, read=read, original=original: read.append(len(where)) or original(where)
        first_batch(data)
        assert read == [12]


def test_token_samples_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="do not go with 3 labels"):
        TokenSamples(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3))
    with pytest.raises(ValueError, match="do not go with"):
        TokenSamples(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(TypeError, match="must be uint8"):
        TensorSamples(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2))


# Under a trainer -----------------------------------------------------------------------------------------------------


class Reader(LightningModule):
    def __init__(self, backbone="bag_of_words", **arguments):
        super().__init__()
        more = {"arguments": {"width": 4, **arguments}} if backbone == "bag_of_words" else {"in_channels": 1}
        self.network = Network(3, backbone, **more)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.network(batch["labeled"]["image"]), batch["labeled"]["label"])

    def validation_step(self, batch, batch_idx):
        self.network(batch["image"])

    def predict_step(self, batch, batch_idx):
        return self.network(batch["image"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder):
    return Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False,
    )  # fmt: skip


def phrases(**arguments):
    return SupervisedData(Phrases(**arguments), batch_size=4, steps=2)


def test_the_vocabulary_is_kept_with_the_run_and_checked_with_the_checkpoint(tmp_path):
    run = trainer(tmp_path)
    run.fit(Reader(), phrases())
    run.save_checkpoint(tmp_path / "x.ckpt")
    kept = str(tmp_path / "tokenizer.json")
    assert load(kept).fingerprint == Phrases().tokenizer.fingerprint
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["SupervisedData"] == {"vocabulary": Phrases().tokenizer.fingerprint}

    def validate(data):
        trainer(tmp_path / "again").validate(Reader(), data, ckpt_path=tmp_path / "x.ckpt", verbose=False)

    validate(phrases())
    validate(phrases(samples=90, tokenizer=kept))
    with pytest.raises(ValueError, match="trained with another vocabulary than Phrases has now"):
        validate(phrases(samples=90))


def supervised_texts():
    recipe = partial(Network, backbone="bag_of_words", arguments={"width": 4})
    return zoo.Supervised(network=recipe, num_classes=3)


def test_another_regime_checks_the_vocabulary_too(tmp_path):
    run = trainer(tmp_path)
    run.fit(supervised_texts(), phrases())
    run.save_checkpoint(tmp_path / "x.ckpt")
    other = SemiSupervisedData(Phrases(samples=90), labels_per_class=2, batch_size=4)
    with pytest.raises(ValueError, match="trained with another vocabulary than Phrases has now"):
        trainer(tmp_path).test(supervised_texts(), other, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    same = SemiSupervisedData(Phrases(), labels_per_class=2, batch_size=4)
    trainer(tmp_path).test(supervised_texts(), same, ckpt_path=tmp_path / "x.ckpt", verbose=False)


def test_the_vocabulary_travels_with_the_weights(tmp_path):
    run = trainer(tmp_path)
    method = supervised_texts()
    run.fit(method, phrases())
    run.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    zoo.load(tmp_path).save_pretrained(tmp_path / "one")
    method.save_pretrained(tmp_path / "two")
    zoo.load(tmp_path / "two").save_pretrained(tmp_path / "three")
    for name in ("one", "two", "three"):
        assert load(str(tmp_path / name / "tokenizer.json")).fingerprint == Phrases().tokenizer.fingerprint
        assert "tokenizer.load" in (tmp_path / name / "README.md").read_text()
    (tmp_path / "one" / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text().replace("own", "won"))
    with pytest.raises(ValueError, match=r"is not the vocabulary that .* was trained with"):
        zoo.load(tmp_path / "one")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="reads token ids, but the vocabulary"):
        zoo.load(tmp_path)


@pytest.mark.parametrize(
    ("reader", "data", "message"),
    [
        (lambda: Reader(vocabulary=20), phrases, "has .* token ids, but the network's vocabulary is 20; make it"),
        (lambda: Reader(pad=3), phrases, "fills rows up with id 0, but the network's padding is 3"),
        (lambda: Reader("tiny_mlp"), phrases, "has texts, but the network's backbone takes images"),
        (Reader, lambda: SupervisedData(Blobs(), batch_size=4), "has images, but the network's backbone takes texts"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_network_and_texts_have_to_fit(tmp_path, reader, data, message, stage):
    with pytest.raises(ValueError, match=message):
        getattr(trainer(tmp_path), stage)(reader(), datamodule=data())


# Tables --------------------------------------------------------------------------------------------------------------


def table(folder, name, *lines):
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


ROWS = [("a fine film", "pos"), ("dull, and long", "neg"), ('a "great" one', "pos"), ("no good", "neg"), ("hm", "")]


def written(folder, kind):
    if kind == "jsonl":
        return table(folder, "x.jsonl", *(json.dumps({"text": t, "label": y or None, "id": 1}) for t, y in ROWS))
    if kind == "tsv":
        return table(folder, "x.tsv", "id\ttext\tlabel", *(f"1\t{t}\t{y}" for t, y in ROWS))
    return table(folder, "x.csv", "text,label", *('"{}",{}'.format(t.replace('"', '""'), y) for t, y in ROWS))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables_of_every_kind(tmp_path, kind):
    source = TextTable(written(tmp_path, kind), test_fraction=0.5, tokenizer="bpe")
    source.prepare()
    assert source.classes == ("neg", "pos")
    parts = source.read()
    assert {part: len(texts) for part, (texts, _) in parts.items()} == {"train": 2, "test": 2, "unlabeled": 1}
    assert sorted(parts["train"][0] + parts["test"][0]) == sorted(t for t, y in ROWS if y)
    assert torch.bincount(source.train().labels).tolist() == torch.bincount(source.test().labels).tolist() == [1, 1]
    assert source.unlabeled().labels.tolist() == [-1]


def test_tables_in_three_files(tmp_path):
    train = table(tmp_path, "train.csv", "review,stars", "good,10", "bad,2", "fine,10")
    test = table(tmp_path, "test.csv", "review,stars", "bad,2")
    loose = table(tmp_path, "loose.csv", "review", "so so", '"a, b\nc"')
    source = TextTable(train, test, loose, text="review", label="stars")
    assert source.classes == ("2", "10")  # by number, not by letter
    assert source.train().labels.tolist() == [1, 0, 1]
    assert source.test().labels.tolist() == [0]
    assert len(source.unlabeled()) == 2
    assert source.read()["unlabeled"][0][1] == "a, b\nc"
    new = TextTable(train, table(tmp_path, "new.csv", "review,stars", "what now,"), text="review", label="stars")
    assert new.test().labels.tolist() == [-1]
    data = SupervisedData(new, batch_size=1, val_size=0)
    assert len(data.predict_dataloader()) == 1
    with pytest.raises(ValueError, match="no sample of 'test' has a label"):
        data.test_dataloader()


def test_the_test_set_adds_no_words(tmp_path):
    train = table(tmp_path, "a.csv", "text,label", "x y,0", "x y,1")
    test = table(tmp_path, "b.csv", "text,label", "secret secret,0")
    assert "secret" not in TextTable(train, test).tokenizer.words


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("x.csv", ["text,lable", "a,1"], "has the columns text, lable; no 'label'. Did you mean 'lable'"),
        ("x.csv", ["text,label", "a,1", "one, two,1"], r"line 3: 3 fields, but the header has 2. A text with a comma"),
        ("x.csv", ["text,label", '"a\nb",1', '"c" d,1'], "line 4: "),
        ("x.csv", ["text,label", "a,1", " ,1"], "line 3: the text is empty"),
        ("x.csv", ["text,label"], "train=.* holds no rows"),
        ("x.csv", [""], "x.csv is empty"),
        ("x.csv", ["text,label", "a,"], "no row of .* has a label"),
        ("x.csv", ["text,label", "a,1"], "test_fraction=0.2 of 1 labelled rows leaves no row for testing"),
        ("x.tsv", ["text\tlabel", "a\tb\t1"], "line 2: 3 fields, but the header has 2. A tab inside a text"),
        ("x.jsonl", ['{"text": "a", "label": 1}', "{"], "line 2: not JSON"),
        ("x.jsonl", ['{"label": 1}'], "line 1: has label; no 'text'"),
        ("x.jsonl", ['{"text": 3, "label": 1}'], "line 1: 'text' is 3, not a text"),
        ("x.jsonl", ['{"text": "a", "label": [1]}'], r"line 1: 'label' is \[1\], not one class"),
        ("x.parquet", ["?"], "must end in .csv, .tsv or .jsonl"),
    ],
)
def test_bad_tables_name_the_line(tmp_path, name, lines, message):
    with pytest.raises(ValueError, match=message):
        TextTable(table(tmp_path, name, *lines)).prepare()


def test_more_bad_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file 'nowhere.csv'"):
        TextTable("nowhere.csv").prepare()
    (tmp_path / "x.csv").write_bytes(b"text,label\ngood,1\ncaf\xe9,1\n")
    with pytest.raises(ValueError, match="line 3: byte 0xe9 is not UTF-8"):
        TextTable(str(tmp_path / "x.csv")).prepare()
    train = table(tmp_path, "a.csv", "text,label", "a,cat", "b,dog")
    with pytest.raises(ValueError, match=r"line 3: label 'dgo' is none of the classes cat, dog. Did you mean 'dog'"):
        TextTable(train, table(tmp_path, "b.csv", "text,label", "a,cat", "b,dgo")).prepare()
    with pytest.raises(ValueError, match="line 3: no label, but other rows have one"):
        TextTable(train, table(tmp_path, "b.csv", "text,label", "a,cat", "b,")).prepare()
    with pytest.raises(ValueError, match=r"test_fraction=1.0 must be between"):
        TextTable(train, test_fraction=1.0)
    with pytest.raises(ValueError, match="names a class twice"):
        TextTable(train, classes=("a", "a"))


def test_image_views_are_the_sources_own():
    assert isinstance(Blobs().weak_view(), Weak)
    assert isinstance(Phrases().strong_view(), StrongText)


# The corpus of four domains ------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The archive's layout, with ten documents of two sentences, or of one where every line is a document."""
    import hashlib
    import io
    import tarfile
    import zipfile

    from datamodules.sources import sentiment

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        for stem in sentiment._FILES.values():
            names = [f"{d}_{s}" for d in range(10) for s in (1, 2)] if stem.startswith(("nyt", "ama")) else range(20)
            rows = [f"{name}\t{n % 3 - 1}\t{stem} says &amp; says {n}".encode() for n, name in enumerate(names)]
            rows[3] += " café".encode("cp1252")
            rows[4] += " café".encode()
            content = b"\r\n".join(rows)
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            entry.size = len(content)
            files.addfile(entry, io.BytesIO(content))
    with zipfile.ZipFile(tmp_path / sentiment._ARCHIVE, "w") as outer:
        outer.writestr(sentiment._INNER, inner.getvalue())
    content = (tmp_path / sentiment._ARCHIVE).read_bytes()
    monkeypatch.setattr(sentiment, "_SHA256", hashlib.sha256(content).hexdigest())
    return tmp_path


def test_sentiment_from_its_own_archive(archive):
    source = Sentiment(str(archive), domain="news")
    source.prepare()
    assert len(source.train()) == 16
    assert len(source.test()) == 4
    parts = source.read()
    numbers = {part: [int(text.split()[4]) for text in texts] for part, (texts, _) in parts.items()}
    for part, (_, labels) in parts.items():
        assert labels.tolist() == [int(n % 3 == 2) for n in numbers[part]]  # ratings -1, 0, 1: only 1 is positive
    assert not {n // 2 for n in numbers["train"]} & {n // 2 for n in numbers["test"]}  # articles stay together
    texts = [text for texts, _ in parts.values() for text in texts]
    assert sum(text.endswith("café") for text in texts) == 2  # in either encoding
    assert all("says & says" in text for text in texts)
    assert Sentiment(str(archive), domain="tweets").tokenizer.fingerprint == source.tokenizer.fingerprint
    assert source.name == "Sentiment (news)"


def test_sentiment_says_how_it_is_had(archive):
    with pytest.raises(FileNotFoundError, match=r"Fetch it with: pip download .* vaderSentiment==0.5"):
        Sentiment(str(archive / "nowhere")).prepare()
    (archive / "vaderSentiment-0.5.zip").write_bytes(b"half")
    with pytest.raises(
        FileNotFoundError, match=r"is not the archive of version 0.5. Fetch it again with: pip download"
    ):
        Sentiment(str(archive)).prepare()
    with pytest.raises(ValueError, match=r"domain='movie' must be one of .* Did you mean 'movies'"):
        Sentiment(domain="movie")
