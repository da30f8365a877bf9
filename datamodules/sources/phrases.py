"""Synthetic texts: for tests and smoke runs, never for a claim."""

from __future__ import annotations

import torch

from datamodules.sources.text import Texts, TextSource
from datamodules.splits import generator
from zoo.core.errors import UserError


class Phrases(TextSource):
    """Each class has words of its own; a text mixes a few of them with words that every class uses.

    Args:
        num_classes: number of classes.
        samples: training texts.
        test_samples: test texts.
        words: own words of a class, and ten times as many that all share.
        length: words of the longest text; the shortest has half of them.
        signal: share of a text's words that are its class's own.
        unlabeled_samples: further texts that come without labels.
        tokenizer: see :class:`~datamodules.sources.text.TextSource`.
        vocabulary: largest number of ids.
        max_length: tokens of a row.
        seed: of the texts.
    """

    def __init__(
        self,
        num_classes: int = 3,
        samples: int = 120,
        test_samples: int = 30,
        words: int = 8,
        length: int = 12,
        signal: float = 0.3,
        unlabeled_samples: int = 0,
        tokenizer: str = "words",
        vocabulary: int = 20_000,
        max_length: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, vocabulary, max_length)
        if num_classes < 1 or samples < num_classes or test_samples < num_classes or words < 1 or length < 2:
            raise UserError(
                f"Phrases: num_classes={num_classes}, samples={samples}, test_samples={test_samples}, words={words}, "
                f"length={length}: at least one class, a sample of each, a word and a length of 2 are needed"
            )
        self.classes = tuple(f"subject {label}" for label in range(num_classes))
        self.sizes = {"train": samples, "test": test_samples, "unlabeled": unlabeled_samples}
        self.words = words
        self.length = length
        self.signal = signal
        self.seed = seed

    def read(self) -> dict[str, Texts]:
        """Part to texts and labels."""
        return {part: self._draw(part, number) for number, part in enumerate(self.sizes, 1) if self.sizes[part]}

    def _draw(self, part: str, purpose: int) -> Texts:
        count, stream = self.sizes[part], generator(self.seed, purpose)
        labels = (torch.arange(count) % self.num_classes)[torch.randperm(count, generator=stream)]
        shape = (count, self.length)
        own = torch.rand(shape, generator=stream) < self.signal
        number = torch.where(
            own,
            torch.randint(self.words, shape, generator=stream),
            torch.randint(10 * self.words, shape, generator=stream),
        )
        lengths = torch.randint(self.length // 2, self.length + 1, (count,), generator=stream)
        rows = zip(labels.tolist(), own.tolist(), number.tolist(), lengths.tolist(), strict=True)
        texts = [
            " ".join(
                f"own{label}x{n}" if is_own else f"shared{n}" for is_own, n in zip(o[:long], ns[:long], strict=True)
            )
            for label, o, ns, long in rows
        ]
        return texts, torch.full((count,), -1) if part == "unlabeled" else labels
