"""The baseline of every family: cross-entropy on the labels there are."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from zoo.core.card import Card
from zoo.core.criteria import Criterion, CrossEntropy, class_counts
from zoo.core.method import Method
from zoo.core.teachers import EMA


class Supervised(Method):
    r"""Cross-entropy on labeled samples.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b))

    Batch: ``labeled`` {image, label}.

    Args:
        momentum: evaluate the moving average of the weights, of this momentum; ``None`` evaluates the weights.
        criterion: what is minimised, from the number of classes to a :class:`~zoo.core.criteria.Criterion`.
        **kwargs: see :class:`~zoo.core.method.Method`.
    """

    card = Card(title="Supervised baseline", year=1986, paper="", family="semi_supervised", roles=("labeled",))

    def __init__(
        self, momentum: float | None = None, criterion: Callable[[int], Criterion] = CrossEntropy, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.momentum, self.criterion_recipe = momentum, criterion

    def build(self) -> None:
        """The network, the criterion, and the network's average where one is wanted."""
        super().build()
        self.criterion = self.criterion_recipe(self.num_classes)
        if self.momentum is not None:
            self.teacher = EMA(self.network, self.momentum)

    def on_fit_start(self) -> None:
        """Tell the criterion how many labeled samples each class has."""
        counts = class_counts(getattr(self.trainer, "datamodule", None), self.num_classes)
        if counts is not None:
            self.criterion.prepare(counts.to(self.device))

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels."""
        labeled = batch["labeled"]
        return self.report(supervised=self.criterion(self.network(labeled["image"]), labeled["label"]))
