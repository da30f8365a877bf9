"""Tent: Fully Test-Time Adaptation by Entropy Minimization.

Wang et al., ICLR 2021, https://arxiv.org/abs/2006.10726
"""

from typing import Any

from torch import Tensor, nn

from zoo.core.batch_norm import normalise_by_batch
from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.test_time import GradientAdaptation
from zoo.losses.entropy import entropy


class Tent(GradientAdaptation):
    r"""Scale and shift of BatchNorm follow the entropy of the predictions on the target downhill.

    .. math:: \min_{\gamma, \beta} \tfrac1B \sum_i H(p(x_i)), \qquad H(p) = -\sum_c p_c \log p_c

    BatchNorm normalises by the batch at hand, not by what it saw of the source. As in the authors' code a batch is
    predicted before the step that it causes; other than there, dropout stays off.

    Batch: ``source`` {image, label}; at test {image, label}.

    Args:
        **kwargs: see :class:`~zoo.domain_adaptation.test_time.GradientAdaptation`.

    Raises:
        UserError: when tested, for a network without BatchNorm.

    Source: Wang et al. 2021, arXiv 2006.10726, section 3.
    """

    card = Card(
        title="Tent: Fully Test-Time Adaptation by Entropy Minimization",
        year=2021,
        paper="arXiv:2006.10726",
        family="domain_adaptation",
        roles=("source",),
    )

    def prepare_copy(self, network: Network) -> dict[str, nn.Parameter]:
        """BatchNorm normalises by the batch; its scales and shifts adapt."""
        return batch_norm_parameters(self, network)

    def learn(self, x: Any) -> Tensor:
        """Predict, then step towards certainty."""
        logits = self.adapted(x)
        self.step(self.gradients(entropy(logits).mean()))
        return logits


def batch_norm_parameters(method: Any, network: Network) -> dict[str, nn.Parameter]:
    """Let BatchNorm normalise by the batch; its scales and shifts by name.

    Raises:
        UserError: where there is none.
    """
    layers = {id(layer) for layer in normalise_by_batch(network)}
    if not layers:
        raise UserError(f"{type(method).__name__}: the network has no BatchNorm, so there is nothing to adapt")
    parts = [(name, part) for name, part in network.named_modules() if id(part) in layers]
    return {f"{name}.{leaf}": p for name, part in parts for leaf, p in part.named_parameters(recurse=False)}
