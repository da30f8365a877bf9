from functools import partial
from types import SimpleNamespace

import pytest
import torch

from zoo import DAN, ContinuedPretraining
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.losses.masked_language import draw_spans, span_corruption, token_loss

SMALL = {"vocabulary": 40, "width": 16, "layers": 1, "heads": 2}
NETWORK = partial(Network, backbone="t5", arguments={**SMALL, "decoder": True})
ADAM = partial(torch.optim.Adam, lr=0.01)


def method(progress: float = 0.0, **arguments) -> ContinuedPretraining:
    torch.manual_seed(0)
    made = ContinuedPretraining(**{"network": NETWORK, "num_classes": 2, "optimizer": ADAM, **arguments})
    made.configure_model()
    made._trainer = SimpleNamespace(
        global_step=round(100 * progress), estimated_stepping_batches=100, training=False, global_rank=0
    )
    return made


def batch(rows: int = 6, length: int = 12) -> dict:
    stream = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (2 * rows, length), generator=stream)
    ids[:, 9:] *= torch.rand(2 * rows, 1, generator=stream) < 0.5  # some rows are shorter
    labels = torch.randint(2, (rows,), generator=stream)
    return {"source": {"image": ids[:rows], "label": labels}, "target": {"image": ids[rows:], "hidden_label": labels}}


class Words:
    """A tokenizer of the words it is given."""

    special, unknown = (0,), 1

    def __init__(self, *known: str) -> None:
        self.known = {word: number for number, word in enumerate(known, 2)}

    def __call__(self, texts, length):
        rows = [[self.known.get(word, 1) for word in text.split()] for text in texts]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int32)


def test_phases_follow_each_other() -> None:
    b = batch()
    for progress, name in ((0.0, "language"), (0.49, "language"), (0.5, "source"), (0.9, "source")):
        found, terms = method(progress), {}
        found.report = lambda terms=terms, **given: terms.update(given) or sum(given.values())
        found.training_step(b, 0)
        assert list(terms) == [name]
    found, terms = method(0.9, mode="joint", language_weight=0.3), {}
    found.report = lambda **given: terms.update(given) or sum(given.values())
    torch.manual_seed(3)
    found.training_step(b, 0)
    torch.manual_seed(3)
    whole = torch.cat([b["source"]["image"], b["target"]["image"]])
    torch.testing.assert_close(terms["language"], 0.3 * found.language_loss(whole))
    torch.testing.assert_close(terms["source"], found.answer_loss(b["source"]["image"], b["source"]["label"]))


def test_scores_of_one_pass_are_the_sums_of_the_words_one_by_one() -> None:
    found = method().eval()
    found.answer_ids = found.answers([[5, 6, 7], [8]])  # of different lengths
    model, ids = found.model, batch()["source"]["image"]
    with torch.no_grad():
        scores = found(ids)
        inputs = found.prompted(ids)
        for row in range(len(ids)):
            for label, words in enumerate(([5, 6, 7], [8])):
                answer = [model.sentinels[0], *words, model.end]
                total = 0.0
                for position, token in enumerate(answer):  # as generation would go: the decoder told all before
                    logits = model.model(
                        input_ids=inputs[row : row + 1],
                        attention_mask=(inputs[row : row + 1] != 0).long(),
                        decoder_input_ids=torch.tensor([[0, *answer[:position]]]),
                    ).logits[0, -1]
                    total += float(logits.log_softmax(0)[token])
                assert float(scores[row, label]) == pytest.approx(total, abs=1e-4)


def test_the_answer_loss_is_that_of_the_library() -> None:
    found = method().eval()
    source = batch()["source"]
    inputs, targets = found.prompted(source["image"]), found.answer_ids[source["label"]]
    theirs = found.model.model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=targets).loss
    torch.testing.assert_close(found.answer_loss(source["image"], source["label"]), theirs)


def test_a_prompt_stands_behind_the_text_and_its_padding_behind_everything() -> None:
    found = method(prompt="it was", verbalizers=["bad", "very good"])
    found.prepare_for(SimpleNamespace(source=SimpleNamespace(tokenizer=Words("it", "was", "bad", "very", "good"))))
    first, end = found.model.sentinels[0], found.model.end
    assert found.prompted(torch.tensor([[9, 8, 0, 0]]))[0].tolist() == [9, 8, 2, 3, first, end] + [0] * 16
    ignored = [-100] * 10
    assert found.answer_ids[0].tolist() == [first, 4, end, *ignored][:10]
    assert found.answer_ids[1].tolist() == [first, 5, 6, end, *ignored][:10]
    x = torch.tensor([[9, 8, 7, 0]])
    torch.testing.assert_close(found.eval()(x), found(torch.cat([x, torch.zeros(1, 5, dtype=torch.long)], dim=1)))


def test_words_that_the_vocabulary_has_not_are_tokens_of_the_class() -> None:
    found = method(verbalizers=["bad", "good"])
    with pytest.warns(UserWarning, match="'good'"):
        found.prepare_for(SimpleNamespace(source=SimpleNamespace(tokenizer=Words("bad"))))
    assert found.answer_ids[:, 1].tolist() == [2, found.model.own[1]]


def test_without_texts_of_the_target_it_is_the_source_alone() -> None:
    """An empty target corpus leaves masked language modelling of the source, with the same draws."""
    b = batch()
    b["target"]["image"] = torch.zeros_like(b["target"]["image"])
    for mode in ("sequential", "joint"):
        both, alone = method(mode=mode), method(mode=mode, texts="source")
        whole = torch.cat([b["source"]["image"], b["target"]["image"]])
        torch.manual_seed(5)
        one = both.training_step(b, 0)
        torch.manual_seed(5)
        mask = draw_spans(whole != 0)[: len(whole) // 2]
        inputs, targets = span_corruption(b["source"]["image"], mask, alone.sentinels, 0, alone.model.end)
        expected = token_loss(alone.model.generate_logits(alone.model.tokens(inputs), inputs, targets), targets)
        if mode == "joint":
            expected = expected + alone.answer_loss(b["source"]["image"], b["source"]["label"])
        torch.testing.assert_close(one, expected)


def test_source_texts_alone_never_read_the_target() -> None:
    b, other = batch(), batch()
    other["target"]["image"] = other["target"]["image"].flip(0)
    values = []
    for given in (b, other):
        found = method(mode="joint", texts="source")
        torch.manual_seed(2)
        values.append(found.training_step(given, 0))
    assert torch.equal(*values)


def test_hidden_labels_of_the_target_change_nothing() -> None:
    gradients = []
    for wrong in (False, True):
        found, b = method(mode="joint"), batch()
        if wrong:
            b["target"]["hidden_label"] = 1 - b["target"]["hidden_label"]
        torch.manual_seed(2)
        found.training_step(b, 0).backward()
        gradients.append([p.grad for p in found.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_every_weight_learns_in_each_phase() -> None:
    for progress in (0.0, 0.9):
        found = method(progress)
        found.training_step(batch(), 0).backward()
        assert not [name for name, p in found.named_parameters() if p.grad is None]


def test_unread_texts_of_the_target_become_likelier() -> None:
    found = method()
    stream = torch.Generator().manual_seed(0)

    def draw(rows: int, offset: int) -> torch.Tensor:
        """Texts that count upwards, in words that only this domain has."""
        start = torch.randint(0, 15, (rows, 1), generator=stream)
        return offset + (start + torch.arange(12)) % 15

    held = draw(64, 20)

    def held_out_loss() -> float:
        torch.manual_seed(9)
        with torch.no_grad():
            return float(found.eval().language_loss(held))

    before = held_out_loss()
    optimizer = torch.optim.Adam(found.train().parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        b = {"source": {"image": draw(16, 2), "label": torch.zeros(16).long()}, "target": {"image": draw(16, 20)}}
        found.training_step(b, 0).backward()
        optimizer.step()
    assert held_out_loss() < 0.6 * before


def test_features_of_the_encoder_can_be_aligned() -> None:
    """DAN on token ids: the mean discrepancy baseline of the paper."""
    dan = DAN(
        network=partial(Network, backbone="t5", arguments=SMALL), num_classes=2, optimizer=ADAM, discrepancy_weight=1.0
    )
    dan.configure_model()
    dan.training_step(batch(), 0).backward()
    assert not [name for name, p in dan.named_parameters() if p.grad is None]


def test_padding_changes_no_feature() -> None:
    network = Network(2, backbone="t5", arguments=SMALL).eval()
    ids = torch.tensor([[3, 4, 5]])
    longer = torch.tensor([[3, 4, 5, 0, 0]])
    torch.testing.assert_close(network.features(ids), network.features(longer))
    assert not network.tokens(longer)[:, 3:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "join"}, "Did you mean 'joint'"),
        ({"texts": "target"}, "texts='target'"),
        ({"pretraining_share": 1.5}, "pretraining_share=1.5"),
        ({"mask_rate": 0.0}, "mask_rate=0.0"),
        ({"verbalizers": ["good"]}, "must be 2"),
        ({"network": partial(Network, backbone="t5", arguments=SMALL)}, "decoder: true"),
        ({"network": partial(Network, backbone="bag_of_words")}, "backbone: t5"),
    ],
)
def test_wrong_arguments_are_named(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        method(**arguments)
