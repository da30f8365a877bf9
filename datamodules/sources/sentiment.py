"""Short texts rated by people, from four places: reviews of films and products, newspapers, and tweets."""

from __future__ import annotations

import hashlib
import html
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import torch

from datamodules.sources.base import MissingData
from datamodules.sources.text import Texts, TextSource
from datamodules.splits import generator
from zoo.core.errors import UserError, suggest

_ARCHIVE = "vaderSentiment-0.5.zip"
_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
_INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILES = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}


class Sentiment(TextSource):
    """10,605 snippets of film reviews, 3,708 of product reviews, 5,190 of newspapers, and 4,200 tweets.

    Twenty people rated each from -4 to 4; a mean above 0 is class ``positive``, the others are ``negative``. The corpus
    comes with the source distribution of the package ``vaderSentiment`` 0.5, states no licence of its own, and is
    therefore fetched and never passed on: ``pip download --no-deps --no-binary vaderSentiment --dest ROOT
    vaderSentiment==0.5``.

    It has no test part. Here a fifth of every domain, drawn once and for all by a fixed seed, is the test set; snippets
    of one review or article stay together. A vocabulary is built from the training texts of all four domains, so that
    a network of one can read the others.

    Args:
        root: folder that holds the archive.
        domain: ``movies``, ``products``, ``news`` or ``tweets``.
        tokenizer: see :class:`~datamodules.sources.text.TextSource`.
        vocabulary: largest number of ids.
        max_length: tokens of a row.

    Source: Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
        Text", ICWSM.
    """

    classes = ("negative", "positive")

    def __init__(
        self,
        root: str = "data",
        domain: Literal["movies", "products", "news", "tweets"] = "movies",
        tokenizer: str = "words",
        vocabulary: int = 20_000,
        max_length: int = 48,
    ) -> None:
        super().__init__(tokenizer, vocabulary, max_length)
        if domain not in _FILES:
            raise UserError(
                f"Sentiment: domain={domain!r} must be one of {', '.join(_FILES)}.{suggest(domain, _FILES)}"
            )
        self.root = root
        self.domain = domain
        self._parts: dict[str, dict[str, Texts]] = {}

    @property
    def name(self) -> str:
        """With the domain: a split of one is none of another."""
        return f"Sentiment ({self.domain})"

    def _archive(self) -> bytes:
        path = Path(self.root) / _ARCHIVE
        command = f"pip download --no-deps --no-binary vaderSentiment --dest {self.root} vaderSentiment==0.5"
        if not path.is_file():
            raise MissingData(
                f"Sentiment: there is no {_ARCHIVE} in {Path(self.root).resolve()}. Fetch it with: {command}"
            )
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != _SHA256:
            raise MissingData(f"Sentiment: {path} is not the archive of version 0.5. Fetch it again with: {command}")
        return content

    def prepare(self) -> None:
        """Check that the corpus is there.

        Raises:
            MissingData: when it is not; the message has the command that fetches it.
        """
        self._archive()

    def read(self) -> dict[str, Texts]:
        """Part to texts and labels."""
        return self._domains()[self.domain]

    def training_texts(self, parts: dict[str, Texts]) -> list[str]:
        """Those of every domain."""
        return [text for domain in _FILES for text in self._domains()[domain]["train"][0]]

    def _domains(self) -> dict[str, dict[str, Texts]]:
        if not self._parts:
            with zipfile.ZipFile(io.BytesIO(self._archive())) as outer:
                inner = io.BytesIO(outer.read(_INNER))
            with tarfile.open(fileobj=inner) as files:
                for number, (domain, stem) in enumerate(_FILES.items()):
                    member = files.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
                    assert member is not None
                    self._parts[domain] = _divide(member.read(), number)
        return self._parts


def _divide(content: bytes, number: int) -> dict[str, Texts]:
    """Training and test part of one domain's file: lines ``id<TAB>rating<TAB>text``, the id ``document_sentence``."""
    documents: dict[str, list[tuple[str, int]]] = {}
    total = 0
    for line in content.splitlines():
        if line.strip():
            identifier, rating, text = _decode(line).split("\t")
            row = html.unescape(text).strip(), int(float(rating) > 0)
            documents.setdefault(identifier.partition("_")[0], []).append(row)
            total += 1
    names = list(documents)
    parts: dict[str, list[tuple[str, int]]] = {"test": [], "train": []}
    for place in torch.randperm(len(names), generator=generator(2014, number)).tolist():
        part = "test" if len(parts["test"]) < total // 5 else "train"
        parts[part] += documents[names[place]]
    return {
        part: ([text for text, _ in rows], torch.tensor([label for _, label in rows])) for part, rows in parts.items()
    }


def _decode(line: bytes) -> str:
    """The files mix encodings from line to line."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")
