"""Questions and answers in words: what is put behind a text, and the ids that are to be generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.losses.masked_language import IGNORED, close_up


def word_ids(tokenizer: Any, text: str, most: int) -> list[int]:
    """Ids of a text's words, at most so many, the unknown one among them but no other that stands for no word.

    Args:
        tokenizer: of a text source; ``tokenizer([text], length)`` gives ids (1, length).
        text: the words.
        most: length that longer texts are cut to.
    """
    return [number for number in map(int, tokenizer([text], most)[0]) if number not in tokenizer.special]


def answer_rows(words: Sequence[Sequence[int]], length: int, sentinel: int, end: int) -> Tensor:
    """What is to be generated, (C, T): the sentinel, the words' ids, the end; filled up with :data:`IGNORED`.

    Args:
        words: ids of the words of each of C answers, at most T - 2.
        length: T.
        sentinel: the id that answers begin with.
        end: the id of the end.
    """
    rows = torch.full((len(words), length), IGNORED)
    for row, ids in zip(rows, words, strict=True):
        row[: len(ids) + 2] = torch.tensor([sentinel, *ids, end])
    return rows


def prompted(ids: Tensor, prompt: Tensor, sentinel: Tensor, end: int, pad: int) -> Tensor:
    """Texts (B, L) with prompt (P,), sentinel and end behind them, (B, L + P + 2), filled up with ``pad``.

    Args:
        ids: texts that stand at the front of their rows.
        prompt: ids, filled up with ``pad``.
        sentinel: the id in whose place the answer is generated.
        end: the id of the end.
        pad: the id that fills rows up.
    """
    behind = torch.stack([*prompt.unbind(), sentinel, torch.full_like(sentinel, end)])
    whole = torch.cat([ids, behind.expand(len(ids), -1)], dim=1)
    return close_up(whole, whole != pad, whole.shape[1], pad)
