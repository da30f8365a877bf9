"""Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain Adaptation (SHOT).

Liang, Hu and Feng, ICML 2020, https://arxiv.org/abs/2002.08546
"""

from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from zoo.core.card import Card
from zoo.core.distributed import gather_with_gradient
from zoo.core.errors import UserError, check_choice
from zoo.core.method import Method
from zoo.losses.centroids import centroid_labels
from zoo.losses.information import information_maximization


class SHOT(Method):
    r"""A network trained on a source learns from an unlabelled target alone, behind its frozen head.

    .. math:: L = \lambda \Big( \tfrac1B \sum_b H(p_b) - H(\bar p) \Big) + \beta \tfrac1B \sum_b H(\hat y_b, p_b)

    Predictions become certain and diverse; the pseudo-labels :math:`\hat y` are those of the nearest class centroid
    among the features of the whole target, see :func:`~zoo.losses.centroids.centroid_labels`. A ``PseudoLabeler`` among
    the callbacks makes them, in evaluation mode, once an epoch, where the authors' 15 intervals of 15 epochs make them.
    The mean prediction :math:`\bar p` is that of all ranks. No source is loaded.

    Start from a network that :class:`~zoo.domain_adaptation.source_only.SourceOnly` has trained with
    ``label_smoothing: 0.1``: ``network: {init_args: {weights: FILE}}``, with the same head, in the paper
    :class:`~zoo.core.heads.WeightNorm`, and neck, :class:`~zoo.core.necks.Bottleneck` with ``relu: false``.

    Batch: ``target`` {image, pseudo_label, pseudo_label_weight}.

    Args:
        information_weight: λ ≥ 0.
        pseudo_label_weight: β ≥ 0; 0.3 for objects in the paper and code, 0.1 for digits.
        diversity: whether H(p̄) counts; the code leaves it out where the target lacks classes.
        epsilon: inside the logarithms, ≥ 0; 1e-5 in the code, 0 is exact.
        distance: ``"cosine"`` or ``"euclidean"``, from features to centroids.
        min_count: classes with so many samples or fewer have no centroid in a round; 0 in the code.
        **kwargs: see :class:`~zoo.core.method.Method`; the code learns a pretrained backbone at a tenth of the rate.

    Raises:
        UserError: for an argument out of its range.

    Source: Liang et al. 2020, arXiv 2002.08546, equations 3-7; labels as in the authors' code after June 2022.
    """

    card = Card(
        title="Do We Really Need to Access the Source Data? Source Hypothesis Transfer",
        year=2020,
        paper="arXiv:2002.08546",
        family="domain_adaptation",
        roles=("target",),
    )
    source_views: ClassVar[tuple[str, ...]] = ()
    target_views: ClassVar[tuple[str, ...]] = ("image",)
    reads_pseudo_labels: ClassVar[bool] = True

    def __init__(
        self,
        information_weight: float = 1.0,
        pseudo_label_weight: float = 0.3,
        diversity: bool = True,
        epsilon: float = 1e-5,
        distance: Literal["cosine", "euclidean"] = "cosine",
        min_count: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        weights = {"information_weight": information_weight, "pseudo_label_weight": pseudo_label_weight}
        for argument, value in {**weights, "epsilon": epsilon, "min_count": min_count}.items():
            if value < 0:
                raise UserError(f"SHOT: {argument}={value} must not be negative")
        check_choice("SHOT", "distance", distance, ("cosine", "euclidean"))
        self.information_weight, self.pseudo_label_weight = information_weight, pseudo_label_weight
        self.diversity, self.epsilon, self.distance, self.min_count = diversity, epsilon, distance, min_count

    def build(self) -> None:
        """The network, whose head stays what the source made it."""
        super().build()
        self.network.head.requires_grad_(False)

    def on_train_start(self) -> None:
        """Warn of a run that nobody gives pseudo-labels."""
        super().on_train_start()
        callbacks: list[Any] = getattr(self.trainer, "callbacks", [])
        if self.pseudo_label_weight and not any(hasattr(callback, "relabel") for callback in callbacks):
            rank_zero_warn("SHOT: without a PseudoLabeler among the callbacks there are no pseudo-labels to learn")

    def labeling_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """What pseudo-labels are made of: ``probabilities`` (B, C) and ``features`` (B, D)."""
        features = self.network.features(batch["image"])
        probabilities = self.network.logits(features).float().softmax(dim=1)
        return {"index": batch["index"], "probabilities": probabilities, "features": features}

    def pseudo_labels(self, outputs: dict[str, Tensor]) -> Tensor:
        """One-hot labels (N, C) of the whole target."""
        labels = centroid_labels(outputs["features"], outputs["probabilities"], self.distance, self.min_count)
        return one_hot(labels, self.num_classes).to(outputs["probabilities"].dtype)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Be certain, be diverse, and agree with the centroids."""
        target = batch["target"]
        logits = self.network(target["image"])
        information = information_maximization(gather_with_gradient(logits), self.epsilon, float(self.diversity))
        losses = cross_entropy(logits, target["pseudo_label"].to(logits.dtype), reduction="none")
        weights = target["pseudo_label_weight"]
        return self.report(
            information=self.information_weight * information,
            pseudo_label=self.pseudo_label_weight * (weights * losses).mean(),
        )
