import json
from pathlib import Path

import pytest
import torch

from zoo.losses.masked_language import (
    IGNORED,
    draw_spans,
    sequence_log_probabilities,
    span_corruption,
    target_length,
    token_loss,
)

PAD, END = 0, 99
SENTINELS = torch.arange(100, 120)


def texts(lengths: list[int], width: int) -> torch.Tensor:
    ids = torch.arange(1, len(lengths) * width + 1).view(len(lengths), width) % 90 + 1
    return torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], ids, PAD)


def by_hand(ids: list[int], mask: list[bool]) -> tuple[list[int], list[int]]:
    """Token by token: what is replaced gives way to one sentinel a run."""

    def replace(drop: list[bool]) -> list[int]:
        out, number, before = [], 0, False
        for token, gone in zip(ids, drop, strict=True):
            if gone and not before:
                out.append(int(SENTINELS[number]))
                number += 1
            elif not gone:
                out.append(token)
            before = gone
        return [*out, END]

    return replace(mask), replace([not gone for gone in mask])


def test_sentinels_are_those_of_the_published_collator(request) -> None:
    golden = json.loads((Path(request.config.rootpath) / "tests/golden/span_corruption.json").read_text())
    ids, mask = torch.tensor(golden["inputs"]["ids"]), torch.tensor(golden["inputs"]["mask"]).bool()
    inputs, targets = span_corruption(ids, mask, SENTINELS, PAD, END)
    for row in range(2):
        assert inputs[row][inputs[row] != PAD].tolist() == golden["outputs"]["inputs"][row]
        assert targets[row][targets[row] != IGNORED].tolist() == golden["outputs"]["targets"][row]


def test_texts_of_any_length_are_corrupted_as_token_by_token() -> None:
    lengths = [1, 2, 5, 9, 14, 20, 20]
    ids = texts(lengths, 20)
    mask = draw_spans(ids != PAD, 0.4, 2.0)
    inputs, targets = span_corruption(ids, mask, SENTINELS, PAD, END)
    assert mask.any()
    for row, length in enumerate(lengths):
        expected = by_hand(ids[row, :length].tolist(), mask[row, :length].tolist())
        assert inputs[row].tolist() == expected[0] + [PAD] * (21 - len(expected[0]))
        if mask[row].any():
            assert targets[row].tolist() == expected[1] + [IGNORED] * (22 - len(expected[1]))
        else:
            assert (targets[row] == IGNORED).all()


@pytest.mark.parametrize(("rate", "span"), [(0.15, 3.0), (0.15, 1.0), (0.5, 3.0)])
def test_the_rate_is_realised_also_for_short_texts(rate, span) -> None:
    lengths = torch.randint(4, 33, (20_000,)).tolist()
    ids = texts(lengths, 32)
    mask = draw_spans(ids != PAD, rate, span)
    assert not mask[ids == PAD].any()
    assert not mask[:, 0].any()
    assert float(mask.sum() / (ids != PAD).sum()) == pytest.approx(rate, abs=0.01)
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    assert float(mask.sum() / begins.sum()) <= span + 0.7
    places = mask[torch.tensor(lengths) == 32].float().mean(dim=0)[1:]  # every place but the first has its turn
    assert rate / 3 < float(places.min()) < float(places.max()) < 3 * rate


def test_short_targets_never_lose_a_token() -> None:
    ids = texts([32] * 500, 32)
    for rate, span in ((0.15, 3.0), (0.3, 2.0)):
        mask = draw_spans(ids != PAD, rate, span)
        length = target_length(32, rate, span)
        _, short = span_corruption(ids, mask, SENTINELS, PAD, END, length)
        _, whole = span_corruption(ids, mask, SENTINELS, PAD, END)
        assert torch.equal(short, whole[:, :length])
        assert (whole[:, length:] == IGNORED).all()


def test_losses_count_only_the_targets_that_are_there() -> None:
    logits = torch.randn(2, 4, 7, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([[3, 6, IGNORED, IGNORED], [0, 1, 2, IGNORED]])
    picked = [
        [float(logits.detach()[b, t].log_softmax(0)[targets[b, t]]) for t in range(4) if targets[b, t] >= 0]
        for b in (0, 1)
    ]
    sums = sequence_log_probabilities(logits, targets)
    assert sums.tolist() == pytest.approx([sum(row) for row in picked], abs=1e-5)
    assert float(token_loss(logits.detach(), targets)) == pytest.approx(
        -(sum(picked[0]) + sum(picked[1])) / 5, abs=1e-5
    )
    nothing = token_loss(logits, torch.full_like(targets, IGNORED))
    nothing.backward()
    assert float(nothing) == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))
