"""What views of texts know of the words: how much they tell, and which stand in the same places.

All from the training texts, without their labels, once before training.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from datamodules.tokenizer import Tokenizer
from zoo.core.errors import UserError

_WINDOW = 2  # words to either side that count as surroundings
_DIMENSIONS = 50
_MOST = 5_000  # the most frequent tokens that get neighbours


class Corpus:
    r"""Statistics of texts, each computed when first asked for.

    With :math:`n_d(w)` occurrences of token w among the :math:`|d|` of text d, and D texts,

    .. math:: \mathrm{idf}(w) = \log \frac{D}{|\{d : n_d(w) > 0\}|}, \qquad
        S(w) = \mathrm{idf}(w) \sum_d \frac{n_d(w)}{|d|}

    Args:
        tokens: (D, L) ids, filled up.
        tokenizer: that made them.

    Source: Xie et al. 2020 (UDA), arXiv 1904.12848, appendix on TF-IDF based word replacing; the sum over texts of
        tf · idf is that of the authors' code (``word_level_augment.py``).
    """

    def __init__(self, tokens: Tensor, tokenizer: Tokenizer) -> None:
        self.tokens = tokens
        self.tokenizer = tokenizer
        self._idf: Tensor | None = None
        self._scores: Tensor | None = None

    @property
    def never(self) -> Tensor:
        """Ids that no view may put in place of a word: padding, other special ones, and the unknown word, (V,) bool."""
        kept = torch.zeros(self.tokenizer.size, dtype=torch.bool)
        unknown = () if self.tokenizer.unknown is None else (self.tokenizer.unknown,)
        kept[[*self.tokenizer.special, *unknown]] = True
        return kept

    def _count(self) -> tuple[Tensor, Tensor]:
        """Idf and S of every id, (V,) float32; an id that does not occur has the idf of one that occurs once."""
        if self._idf is None or self._scores is None:
            size = self.tokenizer.size
            present = self.tokens != self.tokenizer.pad
            for id_ in self.tokenizer.special:
                present &= self.tokens != id_
            text, position = present.nonzero(as_tuple=True)
            word = self.tokens[text, position].long()
            pairs = (text * size + word).unique()
            documents = torch.bincount(pairs % size, minlength=size)
            idf = (max(len(self.tokens), 1) / documents.clamp_min(1)).log().float()
            share = present.sum(1).clamp_min(1).reciprocal()[text]
            frequency = torch.zeros(size).index_add_(0, word, share.float())
            self._idf, self._scores = idf, idf * frequency
        return self._idf, self._scores

    @property
    def idf(self) -> Tensor:
        """How much a token tells of a text, (V,)."""
        return self._count()[0]

    def replacement_weights(self) -> Tensor:
        r"""How likely each id replaces a word: :math:`\max_v S(v) - S(w)` over the ids that occur, (V,) float32.

        Special ids and the unknown word have weight 0, as have those that do not occur.
        """
        _, scores = self._count()
        usable = self.occurring & ~self.never
        if not bool(usable.any()):
            raise UserError("StrongText: the training texts have no word that could replace another")
        weights = (scores[usable].max() - scores).clamp_min(0) * usable
        return weights if float(weights.sum()) > 0 else usable.float()

    @property
    def occurring(self) -> Tensor:
        """Which ids occur, (V,) bool."""
        return torch.bincount(self.tokens.flatten().long(), minlength=self.tokenizer.size) > 0

    def neighbours(self, count: int) -> tuple[Tensor, Tensor]:
        """Tokens used in like surroundings: ids (V, count) and how many of them there are (V,).

        Positive pointwise mutual information of tokens at most two places apart, its 50 strongest directions, and the
        nearest by cosine; for the 5,000 most frequent tokens. Words of opposite meaning are often used alike: "good"
        may be a neighbour of "bad".

        Source: Levy and Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization", section 5.
        """
        import numpy as np
        from scipy.sparse import coo_matrix
        from sklearn.decomposition import TruncatedSVD

        size = self.tokenizer.size
        table, number = torch.zeros(size, count, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
        frequency = torch.bincount(self.tokens.flatten().long(), minlength=size).masked_fill(self.never, 0)
        chosen = frequency.argsort(descending=True, stable=True)[:_MOST]
        chosen = chosen[frequency[chosen] > 0]
        if len(chosen) < 3:
            return table, number
        row = torch.full((size,), -1)
        row[chosen] = torch.arange(len(chosen))
        here = row[self.tokens.long()]
        pairs = []
        for distance in range(1, min(_WINDOW, here.shape[1] - 1) + 1):
            one, other = here[:, :-distance].flatten(), here[:, distance:].flatten()
            known = (one >= 0) & (other >= 0)
            pairs += [torch.stack([one[known], other[known]]), torch.stack([other[known], one[known]])]
        first, second = torch.cat(pairs, 1).numpy()
        joint = coo_matrix((np.ones(len(first)), (first, second)), shape=(len(chosen), len(chosen))).tocsr().tocoo()
        if joint.nnz == 0:
            return table, number
        total = joint.sum()
        margin = np.asarray(joint.sum(1)).ravel()
        information = np.log(joint.data * total / (margin[joint.row] * margin[joint.col]))
        positive = coo_matrix((information.clip(0), (joint.row, joint.col)), shape=joint.shape).tocsr()
        dimensions = min(_DIMENSIONS, len(chosen) - 1)
        vectors = torch.from_numpy(TruncatedSVD(dimensions, random_state=0).fit_transform(positive)).float()
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        likeness = vectors @ vectors.T
        likeness.fill_diagonal_(-torch.inf)
        kept = min(count, len(chosen) - 1)
        nearest = likeness.topk(kept, 1)
        table[chosen, :kept] = chosen[nearest.indices].int()
        number[chosen] = (nearest.values > 0).sum(1).int()
        return table, number


def read_synonyms(path: str | Path, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """A table of synonyms as ids (V, K) and numbers of them (V,): lines ``word<TAB>synonym<TAB>synonym...``.

    Words and synonyms that are not one token of the vocabulary are left out.

    Raises:
        UserError: when there is no such file, a line has no synonym (it is named), or no line has known words.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"StrongText: there is no file synonyms={str(path)!r} ({path.resolve()}). "
            "Expected lines word<TAB>synonym<TAB>synonym..."
        )
    lines: list[list[str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        fields = [field.strip() for field in line.split("\t") if field.strip()]
        if not fields:
            continue
        if len(fields) < 2:
            raise UserError(f"StrongText: line {number} of {path} is {line!r}; expected word<TAB>synonym...")
        lines.append(fields)
    ids = iter(tokenizer.encode_words([word for fields in lines for word in fields]))
    known: dict[int, list[int]] = {}
    for fields in lines:
        word, *synonyms = (next(ids) for _ in fields)
        if word is not None:
            entry = known.setdefault(word, [])
            entry += [id_ for id_ in synonyms if id_ is not None and id_ != word and id_ not in entry]
    known = {word: entry for word, entry in known.items() if entry}
    if not known:
        raise UserError(f"StrongText: no line of {path} has a word and a synonym of the vocabulary")
    table = torch.zeros(tokenizer.size, max(map(len, known.values())), dtype=torch.int32)
    count = torch.zeros(tokenizer.size, dtype=torch.int32)
    for word, entry in known.items():
        table[word, : len(entry)] = torch.tensor(entry, dtype=torch.int32)
        count[word] = len(entry)
    return table, count


def merge(tables: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Candidates by id: those of the first table that has any for it."""
    (table, number), *others = tables
    for next_table, next_number in others:
        width = max(table.shape[1], next_table.shape[1])
        table, next_table = (torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (table, next_table))
        none = number == 0
        table = torch.where(none[:, None], next_table, table)
        number = torch.where(none, next_number, number)
    return table, number
