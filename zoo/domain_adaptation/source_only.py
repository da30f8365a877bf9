"""The baseline of domain adaptation: learn on the source, ignore the target."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.method import Method


class SourceOnly(Method):
    r"""Cross-entropy on the source domain; the target is never looked at.

    .. math:: L = \tfrac1{B_s} \sum_i H(y_i^s, p(x_i^s))

    Batch: ``source`` {image, label}.
    """

    card = Card(title="Source-only baseline", year=1986, paper="", family="domain_adaptation", roles=("source",))

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the source labels."""
        source = batch["source"]
        return self.report(source=cross_entropy(self.network(source["image"]), source["label"]))
