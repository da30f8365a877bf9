"""The baseline of domain adaptation: learn on the source, ignore the target."""

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.method import Method


class SourceOnly(Method):
    r"""Cross-entropy on the source domain; the target is never looked at.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s))

    Batch: ``source`` {image, label}.

    Args:
        label_smoothing: share in [0, 1) of every label that is spread over all classes; what is adapted without the
            source afterwards, as by :class:`~zoo.domain_adaptation.shot.SHOT`, wants 0.1.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: for a share outside [0, 1).
    """

    settings: ClassVar[tuple[str, ...]] = ("closed", "partial", "open", "universal")
    card = Card(title="Source-only baseline", year=1986, paper="", family="domain_adaptation", roles=("source",))

    def __init__(self, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"SourceOnly: label_smoothing={label_smoothing} must lie in [0, 1)")
        self.label_smoothing = label_smoothing

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels."""
        source = batch["source"]
        logits = self.network(source["image"])
        return self.report(source=cross_entropy(logits, source["label"], label_smoothing=self.label_smoothing))
