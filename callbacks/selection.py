"""How good a classifier of single candidates is at choosing among the candidates of a problem."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.files import by_index, gather_rows
from callbacks.heard import HeardLogits
from zoo.core.errors import UserError


class SelectionEvaluation(Callback):
    r"""At every test, takes from K consecutive samples the one that most probably belongs to class 1.

    Sample :math:`iK + k` is candidate k of problem i, as :class:`~datamodules.TextCandidates` numbers them. Logged, as
    :class:`~zoo.weak_to_strong.weaver.Weaver` logs them:

    - ``test/selection``: how often the one that is taken is right, of equal ones by chance,
    - ``test/pass@1``: how often a candidate by chance is,
    - ``test/oracle``: how often any is.

    Problems of which a candidate is missing or has no label do not count.

    Args:
        candidates: K, at least 2.

    Raises:
        UserError: for fewer than 2, for a model of other than two classes, and where no problem is complete.
    """

    measures_tests = True

    def __init__(self, candidates: int = 8) -> None:
        if candidates < 2:
            raise UserError(f"SelectionEvaluation: candidates={candidates} must be at least 2")
        self.candidates = candidates
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._heard = HeardLogits()

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
        """Keep label and score of one batch of the first loader."""
        heard = self._heard.take(batch)
        if dataloader_idx or not heard:
            return
        logits, label = heard[-1]
        if logits.shape[1] != 2:
            raise UserError(
                f"SelectionEvaluation: candidates are wrong or right, but the model has {logits.shape[1]} classes"
            )
        score = logits[:, 1].float() - logits[:, 0].float()
        self._rows.append((batch["index"], torch.stack([label.float(), score], dim=1)))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the ranks together, choose, and log."""
        from zoo.core.verification import selection_accuracy

        rows, self._rows = self._rows, []
        self._heard.leave()
        if not rows:
            raise UserError(f"SelectionEvaluation: {type(pl_module).__name__} gave no logits (B, 2) in the test")
        device = trainer.strategy.root_device
        index, found = by_index(*(gather_rows(torch.cat(part), device) for part in zip(*rows, strict=True)))
        problem = index // self.candidates
        known = torch.zeros(int(problem.max()) + 1).index_add_(0, problem, (found[:, 0] >= 0).float())
        whole = known == self.candidates
        if not bool(whole.any()):
            raise UserError(
                f"SelectionEvaluation: of no problem are all {self.candidates} candidates in the test, with labels"
            )
        label, score = found[whole[problem]].unflatten(0, (-1, self.candidates)).unbind(dim=2)
        values = {
            "selection": selection_accuracy(score, label).mean(),
            "pass@1": label.mean(),
            "oracle": label.amax(dim=1).mean(),
        }
        pl_module.log_dict({f"test/{name}": value for name, value in values.items()}, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._heard.leave()
