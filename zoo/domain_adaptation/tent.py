"""Tent: Fully Test-Time Adaptation by Entropy Minimization.

Wang et al., ICLR 2021, https://arxiv.org/abs/2006.10726
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.network import Network
from zoo.domain_adaptation.test_time import TestTimeAdaptation
from zoo.losses.entropy import entropy


class Tent(TestTimeAdaptation):
    r"""Scale and shift of BatchNorm follow the entropy of the predictions on the target downhill.

    .. math:: \min_{\gamma, \beta} \tfrac1B \sum_i H(p(x_i)), \qquad H(p) = -\sum_c p_c \log p_c

    BatchNorm normalises by the batch at hand, not by what it saw of the source. As in the authors' code a batch is
    predicted before the step that it causes.

    Batch: ``source`` {image, label}; at test {image, label}.

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

    def prepare_copy(self, network: Network) -> list[nn.Parameter]:
        """BatchNorm normalises by the batch; its scales and shifts adapt."""
        layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
        if not layers:
            raise UserError(f"{type(self).__name__}: the network has no BatchNorm, so there is nothing to adapt")
        for layer in layers:
            layer.train()
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
        return [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]

    def adapt(self, x: Tensor) -> Tensor:
        """Predict, then step; with several steps the last prediction counts."""
        for _ in range(self.adaptation_steps):
            logits = self.adapted(x)
            self.step(entropy(logits).mean())
        return logits
