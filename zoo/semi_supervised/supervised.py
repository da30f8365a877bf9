"""The baseline of every family: cross-entropy on the labels there are."""

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.method import Method
from zoo.core.teachers import EMA


class Supervised(Method):
    r"""Cross-entropy on labeled samples.

    .. math:: L = \tfrac1B \sum_b H(y_b, p(x_b))

    Batch: ``labeled`` {image, label}.

    Args:
        momentum: evaluate the moving average of the weights, of this momentum; ``None`` evaluates the weights.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1).
        **kwargs: see :class:`~zoo.core.method.Method`.
    """

    card = Card(title="Supervised baseline", year=1986, paper="", family="semi_supervised", roles=("labeled",))

    def __init__(self, momentum: float | None = None, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.momentum, self.label_smoothing = momentum, label_smoothing

    def build(self) -> None:
        """The network, and its average where one is wanted."""
        super().build()
        if self.momentum is not None:
            self.teacher = EMA(self.network, self.momentum)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels."""
        labeled = batch["labeled"]
        logits = self.network(labeled["image"])
        return self.report(
            supervised=cross_entropy(logits, labeled["label"], label_smoothing=self.label_smoothing),
        )
