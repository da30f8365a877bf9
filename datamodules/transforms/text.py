"""Views of texts, batched on token ids: words left out, replaced and moved.

A view maps ids (B, L) to ids (B, L): padding stays at the end, and tokens that stand for no word (begin, end, mask of a
pretrained tokenizer) stay where they are. Draws are made by the CPU's generator, as those of images.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.transforms.corpus import Corpus, merge, read_synonyms
from datamodules.transforms.views import View
from zoo.core.errors import UserError, suggest

_CANDIDATES = ("tfidf", "neighbours")


class TextView(View):
    """A look at a text: ids (B, L) int64 to ids (B, L); it must be told the corpus before its first use."""

    modality = "text"
    special: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.pad = -1
        self.register_buffer("special", torch.empty(0, dtype=torch.bool), persistent=False)

    def prepare(self, source: Any) -> None:
        """Learn from the source's training texts what the view needs to know of the words.

        Args:
            source: a source of texts; it has a ``corpus``.
        """
        if self.pad < 0:
            self.learn(source.corpus)

    def learn(self, corpus: Corpus) -> None:
        """Take up the ids that are not words."""
        self.pad = corpus.tokenizer.pad
        self.special = torch.zeros(corpus.tokenizer.size, dtype=torch.bool)
        self.special[list(corpus.tokenizer.special)] = True

    def words(self, ids: Tensor) -> Tensor:
        """Where there is a word, (B, L) bool; the view's tables follow the ids to their device."""
        if self.pad < 0:
            raise RuntimeError(f"{type(self).__name__}: learn(corpus) comes first")
        if ids.dtype != torch.int64 or ids.ndim != 2:
            raise TypeError(f"{type(self).__name__}: texts are int64 (B, L), got {ids.dtype} {tuple(ids.shape)}")
        if self.special.device != ids.device:
            self.to(ids.device)
        return ~self.special[ids]


def _share(view: View, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"{type(view).__name__}: {name}={value} must be at least 0 and below 1")


def _draw(ids: Tensor) -> Tensor:
    """One number in [0, 1) a position, drawn on the host."""
    return torch.rand(ids.shape).to(ids.device, non_blocking=True)


def delete(ids: Tensor, drop: Tensor, words: Tensor, pad: int) -> Tensor:
    """Leave out the words at ``drop`` (B, L) and close up; of a text that would lose every word none is left out."""
    drop = drop & words
    emptied = (drop == words).all(1, keepdim=True)
    keep = (ids != pad) & ~(drop & ~emptied)
    length = ids.shape[1]
    target = torch.where(keep, keep.cumsum(1) - 1, length)  # what goes falls into one column more
    closed = ids.new_full((len(ids), length + 1), pad).scatter_(1, target, ids)
    return closed[:, :length]


def shuffle(ids: Tensor, reach: int, words: Tensor) -> Tensor:
    r"""Move words by less than ``reach + 1`` places: in the order of :math:`n + \mathcal U[0, k + 1)`."""
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).float()
    behind = place.masked_fill(~words, torch.inf)
    # stable, so that what is no word sorts alike in both and stays in its place
    before = behind.argsort(dim=1, stable=True)
    after = (behind + _draw(ids) * (reach + 1)).argsort(dim=1, stable=True)
    return ids.scatter(1, before, ids.gather(1, after))


class WordDropout(TextView):
    """Words are left out at random; with probability 0 the text itself.

    Args:
        probability: of each word, in [0, 1).

    Source: Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods for Text Classification",
        section 3.2.
    """

    def __init__(self, probability: float = 0.1) -> None:
        super().__init__()
        _share(self, probability=probability)
        self.probability = probability

    def forward(self, ids: Tensor) -> Tensor:
        """Every text's own draw."""
        words = self.words(ids)
        if self.probability == 0:
            return ids
        return delete(ids, _draw(ids) < self.probability, words, self.pad)


class StrongText(TextView):
    r"""Words are replaced, moved and left out: hard to read, mostly the same meaning.

    Which words are replaced follows from how little they tell: of a text of n words, word i with
    :math:`s_i = \mathrm{tf}_i\,\mathrm{idf}_i` is replaced with probability

    .. math:: \min\Bigl(1,\; p\,\frac{C - s_i}{\frac1n \sum_j (C - s_j)}\Bigr), \qquad C = \max_j s_j

    so that the word that tells most stays. A replaced word becomes one of its synonyms, all equally likely, where the
    table has any; else, with ``"tfidf"``, a word drawn in proportion to :math:`\max_v S(v) - S(w)`, which the text can
    do without, or with ``"neighbours"`` one that is used in like surroundings (see
    :class:`~datamodules.transforms.corpus.Corpus`).

    Args:
        replace: p, the expected share of words replaced, in [0, 1).
        delete: probability of each word to be left out, in [0, 1).
        shuffle: words move by at most this many places; 0 keeps their order.
        synonyms: a file with lines ``word<TAB>synonym<TAB>synonym...``; not needed.
        candidates: what replaces a word without synonyms: ``"tfidf"`` or ``"neighbours"``.
        nearest: number of neighbours.

    Source: replacement: Xie et al. 2020 (UDA), arXiv 1904.12848, appendix on TF-IDF based word replacing, as in the
        authors' code; deletion and shuffle: Lample et al. 2018, arXiv 1711.00043, section 2.3.
    """

    idf: Tensor
    cumulative: Tensor
    table: Tensor
    number: Tensor

    def __init__(
        self,
        replace: float = 0.3,
        delete: float = 0.1,
        shuffle: int = 0,
        synonyms: str | None = None,
        candidates: Literal["tfidf", "neighbours"] = "tfidf",
        nearest: int = 8,
    ) -> None:
        super().__init__()
        _share(self, replace=replace, delete=delete)
        if shuffle < 0 or nearest < 1:
            raise UserError(f"StrongText: shuffle={shuffle} must be at least 0, nearest={nearest} at least 1")
        if candidates not in _CANDIDATES:
            raise UserError(
                f"StrongText: candidates={candidates!r} must be 'tfidf' or 'neighbours'."
                f"{suggest(candidates, _CANDIDATES)}"
            )
        self.replace, self.delete, self.shuffle = replace, delete, shuffle
        self.synonyms, self.candidates, self.nearest = synonyms, candidates, nearest
        for name in ("idf", "cumulative", "table", "number"):
            self.register_buffer(name, None, persistent=False)

    def learn(self, corpus: Corpus) -> None:
        """Take up the words' statistics."""
        super().learn(corpus)
        self.idf = corpus.idf
        weights = corpus.replacement_weights().double()
        self.cumulative = (weights.cumsum(0) / weights.sum()).float()
        tables = [] if self.synonyms is None else [read_synonyms(self.synonyms, corpus.tokenizer)]
        if self.candidates == "neighbours":
            tables.append(corpus.neighbours(self.nearest))
        if tables:
            self.table, self.number = merge(tables)

    def replacement_probability(self, ids: Tensor, words: Tensor) -> Tensor:
        """How likely each word is replaced, (B, L); 0 where there is none."""
        ordered = ids.sort(1).values
        occurrences = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
        count = words.sum(1, keepdim=True).clamp_min(1)
        score = occurrences / count * self.idf[ids]
        highest = score.masked_fill(~words, -torch.inf).amax(1, keepdim=True)
        spare = (highest - score).masked_fill(~words, 0)
        total = spare.sum(1, keepdim=True)
        even = words.to(spare.dtype)  # all tell equally much
        return (self.replace * torch.where(total > 0, spare * count / total.clamp_min(1e-12), even)).clamp_max(1)

    def substitutes(self, ids: Tensor) -> Tensor:
        """A word in place of each, (B, L)."""
        drawn = torch.searchsorted(self.cumulative, _draw(ids), right=True).clamp_max(len(self.cumulative) - 1)
        if self.table is None:
            return drawn
        number = self.number[ids]
        pick = (_draw(ids) * number).long().minimum((number - 1).clamp_min(0).long())
        return torch.where(number > 0, self.table[ids, pick].long(), drawn)

    def forward(self, ids: Tensor) -> Tensor:
        """Every text's own draw."""
        words = self.words(ids)
        if self.shuffle:
            ids = shuffle(ids, self.shuffle, words)  # words only change places with words
        if self.replace:
            chosen = _draw(ids) < self.replacement_probability(ids, words)
            ids = torch.where(chosen, self.substitutes(ids), ids)
        return delete(ids, _draw(ids) < self.delete, words, self.pad) if self.delete else ids
