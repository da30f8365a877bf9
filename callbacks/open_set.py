"""How well a classifier tells samples of its own classes from samples of others that it has never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.features import check_source
from callbacks.files import by_index, gather_rows
from callbacks.heard import HeardLogits
from datamodules.samplers import EvalSampler, Loader
from datamodules.sources.base import Samples, Source
from zoo.core.errors import UserError, suggest

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_logit": lambda logits: logits.amax(dim=1),
    "max_softmax": lambda logits: logits.softmax(dim=1).amax(dim=1),
    "energy": lambda logits: logits.logsumexp(dim=1),
}
"""Logits (B, C) → how much a sample looks like one of a known class (B,)."""


class OpenSetEvaluation(Callback):
    r"""At every test, scores the known test samples and unknown ones, and says how well the score tells them apart.

    With logits :math:`z`, the score of a sample is

    .. math:: \text{max\_logit} = \max_c z_c, \quad \text{max\_softmax} = \max_c \mathrm{softmax}(z)_c, \quad
        \text{energy} = \log \sum_c e^{z_c}

    and for each one it logs ``open_set/<score>/`` ``auroc``, ``aupr``, ``fpr95`` and ``oscr``, see
    :func:`open_set_metrics`. The network is the one that is evaluated; nothing is trained or fitted.

    Unknown samples are those that the data's source holds back (:class:`~datamodules.sources.KnownClasses`), or the
    test samples of a source of other classes. Of every sample only its scores are kept; several processes score their
    shares, and each sample counts once. :class:`~callbacks.RunSummary` with ``test_after_fit`` includes this test.

    Args:
        unknown: a source whose test samples are all of unknown classes, of the size and channels of the data; ``None``
            asks the data's own source.
        scores: any of ``max_logit``, ``max_softmax``, ``energy``.

    Raises:
        UserError: for an unknown score; at setup, where there are no unknown samples or they do not fit the data.

    Source: Vaze et al. 2022, arXiv 2110.06207, section 3 and 4 (the maximum logit); Hendrycks and Gimpel 2017, arXiv
    1610.02136 (maximum softmax); Liu et al. 2020, arXiv 2010.03759, equation 4 (energy, negated, at temperature 1).
    """

    measures_tests = True

    def __init__(self, unknown: Source | None = None, scores: Sequence[str] = ("max_logit",)) -> None:
        for score in scores:
            if score not in SCORES:
                raise UserError(f"OpenSetEvaluation: unknown score {score!r}.{suggest(score, SCORES)}")
        if not scores:
            raise UserError(f"OpenSetEvaluation: scores={scores} must name one of {', '.join(SCORES)}")
        self.unknown = unknown
        self.scores = list(scores)
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._heard = HeardLogits()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before anything costs time that there are unknown samples."""
        if stage not in ("fit", "test"):
            return
        source = getattr(getattr(trainer, "datamodule", None), "source", None)
        if self.unknown is None:
            if not hasattr(source, "unknown"):
                raise UserError(
                    "OpenSetEvaluation: there are no unknown samples. Wrap the data's source in KnownClasses, or give "
                    "the callback a source of other classes as unknown"
                )
            return
        check_source("OpenSetEvaluation", self.unknown, trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the method's own forward."""
        self._rows = []
        self._heard.listen(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score one batch of the first loader; samples without a label are passed over at the end."""
        heard = self._heard.take(batch)
        if dataloader_idx or not heard:
            return
        logits, label = heard[-1]
        if (index := batch.get("index")) is None:  # then every sample counts, whoever has it
            start = (trainer.global_rank * 2**31 + len(self._rows)) * 2**24
            index = torch.arange(start, start + len(label), device=label.device)
        self._rows.append((index, self._row(logits, label)))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the unknown samples, bring the ranks together, and log."""
        known, self._rows = self._rows, []
        self._heard.leave()
        if not known:
            raise UserError(f"OpenSetEvaluation: {type(pl_module).__name__} gave no logits (B, C) in the test")
        known_rows, unknown_rows = (_joined(rows, trainer) for rows in (known, self._score_unknown(trainer, pl_module)))
        known_rows = known_rows[known_rows[:, 0] >= 0]
        for number, name in enumerate(self.scores, start=1):
            right, score = known_rows[:, 0] > 0, known_rows[:, number]
            values = open_set_metrics(score, unknown_rows[:, number], right)
            pl_module.log_dict({f"open_set/{name}/{k}": v for k, v in values.items()}, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._heard.leave()

    def _row(self, logits: Tensor, label: Tensor) -> Tensor:
        """(B, 1 + S): 1 where the most probable class is right, 0 where not, -1 where nobody knows; then the scores."""
        right = (logits.argmax(dim=1) == label).float().where(label >= 0, -1.0)
        return torch.stack([right, *(SCORES[name](logits.float()) for name in self.scores)], dim=1)

    @torch.no_grad()
    def _score_unknown(self, trainer: Trainer, pl_module: LightningModule) -> list[tuple[Tensor, Tensor]]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        samples: Samples = self.unknown.test() if self.unknown is not None else data.source.unknown()
        loader = Loader(samples, EvalSampler(samples, getattr(data, "eval_batch_size", 256)))
        rows = []
        for batch in loader:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            with trainer.precision_plugin.forward_context():
                logits = pl_module(batch["image"])
            rows.append((batch["index"], self._row(logits, torch.full_like(batch["label"], -1))))
        return rows


def _joined(rows: list[tuple[Tensor, Tensor]], trainer: Trainer) -> Tensor:
    """The rows of all ranks, on the CPU, each sample once."""
    index, values = (gather_rows(torch.cat(part), trainer.strategy.root_device) for part in zip(*rows, strict=True))
    return by_index(index, values)[1]


def open_set_metrics(known: Tensor, unknown: Tensor, right: Tensor) -> dict[str, float]:
    r"""How well scores tell known samples :math:`x` from unknown ones :math:`u`; higher scores mean known.

    - ``auroc`` :math:`= P(s(x) > s(u)) + \tfrac12 P(s(x) = s(u))`;
    - ``aupr``: average precision, known samples being the positive ones;
    - ``fpr95``: the share of unknown samples that are accepted at the threshold which accepts at least 95 % of the
      known ones (lower is better);
    - ``oscr``: the area under the rate of known samples that are accepted *and* classified rightly over the rate of
      unknown samples that are accepted,

    .. math:: \text{oscr} = P(s(x) > s(u), \hat y(x) = y) + \tfrac12 P(s(x) = s(u), \hat y(x) = y)

    so that ``oscr`` is at most the accuracy and at most ``auroc``, and equals ``auroc`` where all are classified right.

    Args:
        known: scores (N,), any finite range.
        unknown: scores (M,).
        right: whether the known samples are classified rightly, (N,) bool.

    Raises:
        UserError: where there are no known or no unknown samples.

    Source: Dhamija et al. 2018, arXiv 1811.04110, equation 5 (OSCR); Vaze et al. 2022, arXiv 2110.06207.
    """
    from torchmetrics.functional.classification import (
        binary_auroc,
        binary_average_precision,
        binary_specificity_at_sensitivity,
    )

    if not len(known) or not len(unknown):
        raise UserError(
            f"open-set evaluation needs samples of both kinds, not {len(known)} known, {len(unknown)} unknown"
        )
    # Ranks instead of scores: torchmetrics would send scores outside [0, 1] through a sigmoid, which makes ties.
    distinct, ranks = torch.cat([known, unknown]).double().unique(return_inverse=True)
    ranks = ranks.double() / max(len(distinct) - 1, 1)
    target = torch.cat([torch.ones(len(known)), torch.zeros(len(unknown))]).long()
    specificity, _ = binary_specificity_at_sensitivity(ranks, target, min_sensitivity=0.95)
    unknown, chosen = unknown.double().sort().values, known.double()[right.bool()]
    below = torch.searchsorted(unknown, chosen) + torch.searchsorted(unknown, chosen, right=True)
    return {
        "auroc": float(binary_auroc(ranks, target)),
        "aupr": float(binary_average_precision(ranks, target)),
        "fpr95": 1.0 - float(specificity),
        "oscr": float(below.sum()) / (2 * len(known) * len(unknown)),
    }
