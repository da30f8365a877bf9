"""How Useful is Continued Pre-Training for Generative Unsupervised Domain Adaptation?

Uppaal, Li and Hu, RepL4NLP 2024, https://arxiv.org/abs/2401.17514
"""

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zoo.core.card import Card
from zoo.core.errors import UserError, check_choice
from zoo.core.prompts import answer_rows, prompted, word_ids
from zoo.core.text_nets import T5
from zoo.domain_adaptation.base import DomainAdaptation
from zoo.losses.masked_language import (
    draw_spans,
    sequence_log_probabilities,
    span_corruption,
    target_length,
    token_loss,
)

_PROMPT, _WORDS = 16, 8  # most tokens of the prompt, and of a class's words


class ContinuedPretraining(DomainAdaptation):
    r"""A language model that has read the target's texts answers a prompt that only source texts taught it.

    .. math:: L_1 = -\frac1T \sum_t \log p(m_t \mid m_{<t}, \tilde x), \; x \in S \cup T, \qquad
        L_2 = -\frac1T \sum_t \log p(v_t(y) \mid v_{<t}(y), \text{prompt}(x)), \; (x, y) \in S

    :math:`L_1` is masked language modelling: 15 % of the tokens, in spans, are left out of :math:`\tilde x` and
    generated, see :func:`~zoo.losses.masked_language.span_corruption`. :math:`L_2` generates the words of the class in
    place of the sentinel behind the prompt. The model's answer is the class with the most probable words.

    Implemented from the paper's description: its code is not published. From the paper are both tasks, the unlabelled
    texts of both domains, labels as generated words, two phases or one, and 15 %. Our choice are T5's spans, the share
    of the steps, one schedule of the learning rate for both phases, the prompt, the weight, and the scoring of given
    words in place of free generation. No model is pretrained here unless weights are given, so that the first phase is
    the pretraining.

    Batch: ``source`` {image, label}, ``target`` {image}; they are token ids.

    Args:
        mode: ``"sequential"`` has :math:`L_1` first, then :math:`L_2`; ``"joint"`` their sum in every step.
        pretraining_share: of the steps for :math:`L_1`, in [0, 1], where sequential; 0 is prompting alone.
        language_weight: of :math:`L_1` ≥ 0, where joint.
        texts: whose texts :math:`L_1` is on: ``"both"``, or ``"source"`` for comparison, which never sees the target.
        mask_rate: share of tokens left out, in (0, 1).
        span: mean length of a span.
        prompt: words behind the text and in front of the answer.
        verbalizers: the words of each class. ``None``, and words that the vocabulary has not, are tokens of their own.
        **kwargs: see :class:`~zoo.domain_adaptation.base.DomainAdaptation`; the network is a ``t5`` with a decoder, and
            its head is left out.

    Raises:
        UserError: for a value out of range, or another network.

    Source: Uppaal et al. 2024, arXiv 2401.17514, section 3; T5: Raffel et al. 2020, arXiv 1910.10683.
    """

    card = Card(
        title="How Useful is Continued Pre-Training for Generative Unsupervised Domain Adaptation?",
        year=2024,
        paper="arXiv:2401.17514",
        family="domain_adaptation",
        roles=("source", "target"),
    )
    published_forward_pass: ClassVar[Literal["joint", "split"]] = "joint"
    prompt_ids: Tensor
    answer_ids: Tensor
    sentinels: Tensor

    def __init__(
        self,
        mode: Literal["sequential", "joint"] = "sequential",
        pretraining_share: float = 0.5,
        language_weight: float = 1.0,
        texts: Literal["both", "source"] = "both",
        mask_rate: float = 0.15,
        span: float = 3.0,
        prompt: str = "it was",
        verbalizers: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        check_choice(name, "mode", mode, ("sequential", "joint"))
        check_choice(name, "texts", texts, ("both", "source"))
        if not 0 <= pretraining_share <= 1 or language_weight < 0:
            raise UserError(
                f"{name}: pretraining_share={pretraining_share} must lie in [0, 1], language_weight={language_weight} "
                "must not be negative"
            )
        if not 0 < mask_rate < 1 or span < 1:
            raise UserError(f"{name}: mask_rate={mask_rate} must lie between 0 and 1, span={span} be at least 1")
        if verbalizers is not None and len(verbalizers) != self.num_classes:
            raise UserError(f"{name}: verbalizers={verbalizers} must be {self.num_classes}, one for each class")
        self.mode, self.pretraining_share = mode, pretraining_share
        self.language_weight, self.texts = language_weight, texts
        self.mask_rate, self.span, self.prompt, self.verbalizers = mask_rate, span, prompt, verbalizers

    @property
    def model(self) -> T5:
        """The language model."""
        return self.network.backbone.model

    def build(self) -> None:
        """The language model; classes have tokens of their own as long as no vocabulary is known."""
        super().build()
        model, name = self.network.backbone.model, type(self).__name__
        if not isinstance(model, T5) or not hasattr(model.model, "decoder"):
            raise UserError(f"{name}: the network must generate: backbone: t5 with arguments: {{decoder: true}}")
        if len(model.own) < self.num_classes:
            raise UserError(f"{name}: {self.num_classes} classes need as many ids: make reserved of the t5 larger")
        self.network.head = nn.Identity()  # words are generated instead
        self.register_buffer("sentinels", torch.tensor(model.sentinels))
        self.register_buffer("prompt_ids", torch.full((_PROMPT,), model.pad))
        self.register_buffer("answer_ids", self.answers([[own] for own in model.own[: self.num_classes]]))

    def answers(self, words: list[list[int]]) -> Tensor:
        """Targets (C, T) of the classes: the first sentinel, the words' ids, the end."""
        return answer_rows(words, _WORDS + 2, self.model.sentinels[0], self.model.end)

    def on_fit_start(self) -> None:
        """Look the words up."""
        if (data := getattr(self.trainer, "datamodule", None)) is not None:
            self.prepare_for(data)

    def prepare_for(self, data: Any) -> None:
        """Look the words of prompt and classes up in the vocabulary of the data, whose ids checkpoints keep."""
        if (tokenizer := getattr(data.source, "tokenizer", None)) is None:
            return
        known = [i for i in word_ids(tokenizer, self.prompt, _PROMPT) if i != tokenizer.unknown]
        prompt = torch.full((_PROMPT,), self.model.pad)
        prompt[: len(known)] = torch.tensor(known, dtype=torch.long)
        self.prompt_ids = prompt.to(self.device)
        words: list[list[int]] = []
        for own, text in zip(self.model.own, self.verbalizers or [], strict=False):
            ids = word_ids(tokenizer, text, _WORDS)
            if tokenizer.unknown in ids or not ids or ids in words:
                rank_zero_warn(f"{type(self).__name__}: the vocabulary has not {text!r}; the class has its own token")
                ids = [own]
            words.append(ids)
        if words:
            self.answer_ids = self.answers(words).to(self.device)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Read the texts of both domains, then answer for those of the source; or both at once."""
        source, target = batch["source"], batch["target"]
        reads = self.mode == "joint" or self.progress < self.pretraining_share
        terms = {}
        if reads:
            texts = [source["image"]] if self.texts == "source" else [source["image"], target["image"]]
            weight = self.language_weight if self.mode == "joint" else 1.0
            terms["language"] = weight * self.language_loss(torch.cat(texts))
        if self.mode == "joint" or not reads:
            terms["source"] = self.answer_loss(source["image"], source["label"])
        return self.report(**terms)

    def language_loss(self, ids: Tensor) -> Tensor:
        """L₁ of texts (B, L), with spans drawn now."""
        model = self.model
        mask = draw_spans(ids != model.pad, self.mask_rate, self.span)
        length = target_length(ids.shape[1], self.mask_rate, self.span)
        inputs, targets = span_corruption(ids, mask, self.sentinels, model.pad, model.end, length)
        return token_loss(model.generate_logits(model.tokens(inputs), inputs, targets), targets)

    def answer_loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """L₂ of texts (B, L) and their labels (B,)."""
        inputs, targets = self.prompted(ids), self.answer_ids[labels]
        return token_loss(self.model.generate_logits(self.model.tokens(inputs), inputs, targets), targets)

    def prompted(self, ids: Tensor) -> Tensor:
        """Texts (B, L) with prompt, sentinel and end behind them, (B, L + P)."""
        return prompted(ids, self.prompt_ids, self.sentinels[0], self.model.end, self.model.pad)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, C) of the words of each class; they need not sum to 1."""
        inputs = self.prompted(x)
        states = self.model.tokens(inputs)
        count = self.num_classes
        logits = self.model.generate_logits(
            states.repeat_interleave(count, 0), inputs.repeat_interleave(count, 0), self.answer_ids.repeat(len(x), 1)
        )
        return sequence_log_probabilities(logits, self.answer_ids.repeat(len(x), 1)).view(len(x), count)
