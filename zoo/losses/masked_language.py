r"""Masked language modelling on rows of token ids, in the form of T5: spans are left out, and are to be generated.

Of "the cute dog walks in the park" with the spans "cute dog" and "the" left out, the input is "the <0> walks in <1>
park" and the target "<0> cute dog <1> the <2>": every span gives way to one sentinel, and in the target everything else
does. Both end with the token for the end.

Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv
1910.10683, section 3.1.4 and figure 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "draw_spans", "sequence_log_probabilities", "span_corruption", "target_length", "token_loss"]

IGNORED = -100  # a target that no loss counts, as in transformers


def draw_spans(present: Tensor, rate: float = 0.15, span: float = 3.0) -> Tensor:
    r"""Tokens to leave out, (B, L) bool, in spans at random places; the first token of a text stays.

    Made for short texts, where it departs from T5 twice. Of n tokens :math:`\lfloor n \cdot \text{rate} + u \rfloor`
    are left out, u uniform in [0, 1), so that the rate holds in the mean; T5 rounds, and leaves out one at least. And
    the last token may stay, which T5 leaves out of every text. Draws are the CPU's.

    Args:
        present: (B, L) bool, where there is a token; texts stand at the front of their rows.
        rate: share of the tokens, in [0, 1).
        span: mean length of a span, ≥ 1.
    """
    rows, length = present.shape
    draws = torch.rand(3, rows, length + 1).to(present.device, non_blocking=True)
    tokens = present.sum(dim=1)
    noise = (tokens * rate + draws[2, :, 0]).floor().long().minimum(tokens - 1).clamp_min(0)
    kept = tokens - noise
    spans = (noise / span).round().long().clamp_min(1).minimum(noise).minimum(kept)
    stay = _segments(kept + 1, spans + 1, draws[0])  # one span more than is left out, of which the last may be empty
    stay = stay.scatter_add(1, spans.unsqueeze(1), stay.new_full((rows, 1), -1))
    lengths = torch.stack([stay, _segments(noise, spans, draws[1])], dim=2)
    ends = lengths.flatten(1).cumsum(dim=1).clamp_max(length)  # stay, noise, stay, noise, ...
    starts = ends.new_zeros(rows, length + 1).scatter_add_(1, ends, torch.ones_like(ends))
    return (starts.cumsum(dim=1)[:, :length] % 2 == 1) & present & (noise > 0).unsqueeze(1)


def _segments(items: Tensor, segments: Tensor, draws: Tensor) -> Tensor:
    """Lengths (B, L) of a random division of ``items`` (B,) into ``segments`` (B,) that are not empty; then zeros."""
    places = torch.arange(draws.shape[1], device=draws.device)
    inside = places < items.unsqueeze(1)
    scores = draws.masked_fill(~inside | (places == 0), -1.0)  # a segment may begin at any item but the first
    place = scores.argsort(dim=1, descending=True).argsort(dim=1)
    begins = (place < segments.unsqueeze(1) - 1) & inside
    return torch.zeros_like(place).scatter_add_(1, begins.long().cumsum(dim=1), inside.long())


def target_length(length: int, rate: float, span: float) -> int:
    """Tokens of the longest target of texts of up to ``length`` tokens, whatever is drawn."""
    noise = min(int(length * rate) + 1, length)
    return noise + max(round(noise / span), 1) + 2  # a sentinel a span, one behind the last, and the end


def span_corruption(
    ids: Tensor, mask: Tensor, sentinels: Tensor, pad: int, end: int, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs (B, L + 1), filled up with ``pad``, and targets (B, T), filled up with :data:`IGNORED`.

    A text of which nothing is left out has nothing to generate: its target is empty.

    Args:
        ids: (B, L); texts stand at the front of their rows.
        mask: (B, L) bool, tokens to leave out; no row begins with one.
        sentinels: (S,) ids, in their order; as many as there are spans, and one more.
        pad: the id that fills rows up.
        end: the id of the end.
        length: T; ``None`` is L + 2, where everything fits.
    """
    present = ids != pad
    mask = mask & present
    inputs = _with_sentinels(ids, mask, present & ~mask, sentinels, ids.shape[1] + 1, pad, end)
    targets = _with_sentinels(ids, present & ~mask, mask, sentinels, length or ids.shape[1] + 2, IGNORED, end)
    return inputs, targets.masked_fill(~mask.any(dim=1, keepdim=True), IGNORED)


def _with_sentinels(
    ids: Tensor, replaced: Tensor, kept: Tensor, sentinels: Tensor, length: int, fill: int, end: int
) -> Tensor:
    begins = replaced & ~F.pad(replaced, (1, 0))[:, :-1]
    numbers = (begins.long().cumsum(dim=1) - 1).clamp(0, len(sentinels) - 1)
    values = torch.where(begins, sentinels[numbers], ids)
    values = torch.cat([values, values.new_full((len(ids), 1), end)], dim=1)
    keep = F.pad(kept | begins, (0, 1), value=True)
    return close_up(values, keep, length, fill)


def close_up(values: Tensor, keep: Tensor, length: int, fill: int) -> Tensor:
    """The entries of each row that are kept, in their order, at its front: (B, L) → (B, length)."""
    places = torch.where(keep, keep.long().cumsum(dim=1) - 1, length).clamp_max(length)
    return values.new_full((len(values), length + 1), fill).scatter_(1, places, values)[:, :length]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Mean of :math:`-\log p(t_i \mid t_{<i}, x)` over the targets that count; 0 where none does.

    Args:
        logits: (B, T, V).
        targets: (B, T), or :data:`IGNORED`.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp_min(1)


def sequence_log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    r""":math:`\log p(t \mid x) = \sum_i \log p(t_i \mid t_{<i}, x)`, (B,), over the targets that count.

    Args:
        logits: (B, T, V).
        targets: (B, T), or :data:`IGNORED`.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(targets.shape).sum(dim=1)
