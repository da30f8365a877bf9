"""Self-Training: A Survey: the loop that learns, labels what it is sure of, and learns again.

Amini et al. 2022, https://arxiv.org/abs/2202.12040
"""

from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.losses.weighted import weighted_mean
from zoo.semi_supervised.base import SemiSupervised


class SelfTraining(SemiSupervised):
    r"""Pseudo-labels made between trainings are learned like labels.

    .. math:: L = \frac1{|S|} \sum_{b \in S} H(y_b, p(x_b)) + \gamma \frac{\sum_{b \in T} w_b H(q_b, p(u_b))}
        {\sum_{b \in T} w_b}

    :math:`S` are the labeled and :math:`T` the unlabeled samples of the step; targets :math:`q` and weights :math:`w`
    are what the ``PseudoLabeler`` callback made of the last predictions: it owns the loop, a selection of
    :mod:`zoo.policies.selection` decides whom to believe. Where all weights are 0, as before the first round, the
    second term is 0 and this is supervised learning. The two means have equal weight at :math:`\gamma = 1`, the
    reweighting by 1/l and 1/s of MSLA.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak or strong, pseudo_label, pseudo_label_weight}.

    Args:
        unlabeled_weight: :math:`\gamma` ≥ 0.
        view: the student's view of unlabeled samples.
        mean_over: ``"selected"`` as above; ``"all"`` divides by the number of unlabeled samples in the step instead, so
            that the term grows with the selection: with :math:`\gamma = N / l` every sample counts alike, as without
            MSLA's reweighting.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Raises:
        UserError: if an argument is out of its range.

    Source: Amini et al. 2022, arXiv 2202.12040, the loop; Feofanov et al. 2019, AAAI, the reweighting.
    """

    card = Card(
        title="Self-Training: A Survey",
        year=2022,
        paper="arXiv:2202.12040",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    labeled_view = "image"
    reads_pseudo_labels: ClassVar[bool] = True

    def __init__(
        self,
        unlabeled_weight: float = 1.0,
        view: Literal["weak", "strong"] = "weak",
        mean_over: Literal["selected", "all"] = "selected",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if unlabeled_weight < 0.0:
            raise UserError(f"{type(self).__name__}: unlabeled_weight={unlabeled_weight} must not be negative")
        for name, value, known in (("view", view, ("weak", "strong")), ("mean_over", mean_over, ("selected", "all"))):
            if value not in known:
                raise UserError(f"{type(self).__name__}: {name}={value!r} must be one of {', '.join(known)}")
        self.unlabeled_weight, self.view, self.mean_over = unlabeled_weight, view, mean_over
        self.unlabeled_views = (view,)  # type: ignore[misc]  # what the data makes for this run

    def on_fit_start(self) -> None:
        """Say so where nobody will ever label."""
        super().on_fit_start()
        trainer = self.trainer
        labeled = getattr(getattr(trainer, "datamodule", None), "_labels", None) is not None
        if not labeled and not any(hasattr(callback, "relabel") for callback in trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{type(self).__name__}: no PseudoLabeler among the callbacks and no pseudo_labels in the data: "
                "this run learns from the labels alone"
            )

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels and the pseudo-labels."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        targets, weights = unlabeled["pseudo_label"], unlabeled["pseudo_label_weight"]
        logits, student = self.together([labeled[self.labeled_view], unlabeled[self.view]])
        self.watch(unlabeled, targets, weights)
        losses = cross_entropy(student.float(), targets, reduction="none")
        mean = weighted_mean(losses, weights) if self.mean_over == "selected" else (weights * losses).mean()
        return self.report(supervised=self.criterion(logits, labeled["label"]), unlabeled=self.unlabeled_weight * mean)
