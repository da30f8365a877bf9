"""Small networks for rows of token ids: a convolution over words, and the mean of their vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import UserError

__all__ = ["TEXT_NETS", "BagOfWords", "TextCNN", "TextNet"]


class TextNet(nn.Module):
    """Embeddings of token ids; what follows is the subclass's.

    Args:
        vocabulary: number of ids that can be looked up, 0 .. vocabulary - 1.
        width: length of an embedding.
        pad: the id that fills rows up: it stands for nothing, and any number of it changes no output.

    Raises:
        UserError: when a number is out of range.
    """

    num_features: int

    def __init__(self, vocabulary: int = 20_000, width: int = 64, pad: int = 0) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("width", width)):
            if value < 1:
                raise UserError(f"{type(self).__name__}: {name}={value} must be at least 1")
        if not 0 <= pad < vocabulary:
            raise UserError(f"{type(self).__name__}: pad={pad} must be an id below vocabulary={vocabulary}")
        self.vocabulary = vocabulary
        self.pad = pad
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=pad)

    def present(self, ids: Tensor) -> Tensor:
        """1 where there is a token and 0 where a row is filled up, (B, L, 1)."""
        return (ids != self.pad).unsqueeze(-1).to(self.embedding.weight.dtype)

    def tokens(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to the vectors of their positions (B, L, D), zero where a row is filled up."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to features (B, D)."""
        raise NotImplementedError


class BagOfWords(TextNet):
    r"""The mean of the words' vectors, whatever their order: :math:`\sum_n m_n e_n / \sum_n m_n`.

    Args:
        vocabulary: number of ids.
        width: length of an embedding, and of the features.
        pad: the id that fills rows up.

    Source: Joulin et al. 2017, "Bag of Tricks for Efficient Text Classification", arXiv 1607.01759, section 2.
    """

    def __init__(self, vocabulary: int = 20_000, width: int = 64, pad: int = 0) -> None:
        super().__init__(vocabulary, width, pad)
        self.num_features = width

    def tokens(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to embeddings (B, L, D)."""
        return self.embedding(ids) * self.present(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to features (B, D)."""
        return self.tokens(ids).sum(1) / self.present(ids).sum(1).clamp_min(1)


class TextCNN(TextNet):
    """Convolutions over windows of several widths, ReLU, maximum over positions.

    The paper's windows of 3, 4 and 5 words with 100 maps each are 300 features; windows reach over the ends of a text,
    where there are zeros.

    Args:
        vocabulary: number of ids.
        width: length of an embedding.
        maps: channels per window.
        windows: numbers of words that a convolution sees at once.
        pad: the id that fills rows up.

    Source: Kim 2014, "Convolutional Neural Networks for Sentence Classification", arXiv 1408.5882, section 2.
    """

    def __init__(
        self,
        vocabulary: int = 20_000,
        width: int = 64,
        maps: int = 100,
        windows: Sequence[int] = (3, 4, 5),
        pad: int = 0,
    ) -> None:
        super().__init__(vocabulary, width, pad)
        if maps < 1 or not windows or min(windows) < 1:
            raise UserError(f"TextCNN: maps={maps} and windows={tuple(windows)} must be at least 1")
        self.windows = nn.ModuleList(nn.Conv1d(width, maps, window) for window in windows)
        self.num_features = maps * len(windows)

    def tokens(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to what the windows around them show (B, L, D)."""
        x = self.embedding(ids).transpose(1, 2)
        maps = []
        for window in self.windows:
            reach = int(window.kernel_size[0]) - 1  # type: ignore[index, arg-type]
            maps.append(F.relu(window(F.pad(x, (reach // 2, reach - reach // 2)))))
        return torch.cat(maps, 1).transpose(1, 2) * self.present(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to features (B, D)."""
        return self.tokens(ids).amax(1)  # positions without a word are 0, which ReLU's maximum passes over


#: The names that :func:`zoo.core.backbones.create_backbone` knows for token ids.
TEXT_NETS: dict[str, type[TextNet]] = {"bag_of_words": BagOfWords, "text_cnn": TextCNN}
