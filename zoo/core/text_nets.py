"""Small networks for rows of token ids: a convolution over words, and the mean of their vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import UserError

__all__ = ["T5", "TEXT_NETS", "BagOfWords", "TextCNN", "TextNet"]


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


class T5(TextNet):
    """A small T5 of the library transformers, with random weights; the mean of its encoder's states are the features.

    Ids behind the vocabulary are its own: the end of a text, tokens for classes, and from the last id down the
    sentinels that stand for what is left out, as in the published models.

    Args:
        vocabulary: number of ids that a tokenizer may give.
        width: of the states, a multiple of ``heads``.
        layers: of the encoder, and of the decoder.
        heads: of the attention.
        decoder: whether there is one: only to generate.
        reserved: further ids.
        sentinels: how many of them are sentinels.
        dropout: rate, in [0, 1).
        pad: the id that fills rows up.

    Source: Raffel et al. 2020, arXiv 1910.10683, section 2.1.
    """

    def __init__(
        self,
        vocabulary: int = 20_000,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        decoder: bool = False,
        reserved: int = 128,
        sentinels: int = 100,
        dropout: float = 0.0,
        pad: int = 0,
    ) -> None:
        nn.Module.__init__(self)  # the library's network has the embedding
        if width < 1 or heads < 1 or layers < 1 or width % heads:
            raise UserError(f"T5: width={width} must be a multiple of heads={heads}, and layers={layers} at least 1")
        if not 0 <= pad < vocabulary or not 0 <= dropout < 1:
            raise UserError(f"T5: pad={pad} must be an id below vocabulary={vocabulary}, dropout={dropout} in [0, 1)")
        if not 1 <= sentinels < reserved:
            raise UserError(f"T5: sentinels={sentinels} must be at least 1 and below reserved={reserved}")
        from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

        self.vocabulary, self.pad, self.num_features = vocabulary, pad, width
        self.end, self.own = vocabulary, range(vocabulary + 1, vocabulary + reserved - sentinels)
        self.sentinels = list(range(vocabulary + reserved - 1, vocabulary + reserved - 1 - sentinels, -1))
        config = T5Config(
            vocab_size=vocabulary + reserved, d_model=width, d_kv=width // heads, d_ff=4 * width, num_layers=layers,
            num_decoder_layers=layers, num_heads=heads, dropout_rate=dropout, pad_token_id=pad, eos_token_id=self.end,
            use_cache=False,
        )  # fmt: skip
        config.decoder_start_token_id = pad
        self.model = (T5ForConditionalGeneration if decoder else T5EncoderModel)(config)

    def present(self, ids: Tensor) -> Tensor:
        """1 where there is a token and 0 where a row is filled up, (B, L, 1)."""
        return (ids != self.pad).unsqueeze(-1).to(self.model.shared.weight.dtype)

    def tokens(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to the encoder's states (B, L, D), zero where a row is filled up."""
        states = self.model.get_encoder()(input_ids=ids, attention_mask=(ids != self.pad).long()).last_hidden_state
        return states * self.present(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to features (B, D)."""
        return self.tokens(ids).sum(1) / self.present(ids).sum(1).clamp_min(1)

    def generate_logits(self, states: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        """What the decoder, told the targets so far, expects next: (B, T, V).

        Args:
            states: of the encoder, (B, L, D), see :meth:`tokens`.
            ids: that they are of, (B, L).
            targets: (B, T); negative ones are taken for padding.
        """
        before = torch.cat([targets.new_full((len(targets), 1), self.pad), targets[:, :-1]], dim=1)
        before = torch.where(before < 0, self.pad, before)
        return self.model(
            encoder_outputs=(states,), attention_mask=(ids != self.pad).long(), decoder_input_ids=before
        ).logits


#: The names that :func:`zoo.core.backbones.create_backbone` knows for token ids.
TEXT_NETS: dict[str, type[TextNet]] = {"bag_of_words": BagOfWords, "t5": T5, "text_cnn": TextCNN}
