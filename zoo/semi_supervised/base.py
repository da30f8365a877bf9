"""What the consistency methods share: their batches, one forward over several views, and what they watch."""

from typing import Any, Literal

import torch
from torch import Tensor

from zoo.core.method import Method
from zoo.core.teachers import EMA
from zoo.semi_supervised.supervised import Supervised


class SemiSupervised(Method):
    """Base of methods on ``labeled`` {image, label} and ``unlabeled`` {weak, strong, index, hidden_label}.

    Args:
        momentum: momentum of the weights' average, which is what is evaluated.
        forward_pass: ``"joint"`` sends labeled, weak and strong views through the network in one batch, as the papers
            do, so that BatchNorm sees them together; ``"split"`` sends the weak views apart and without a graph, which
            is a third cheaper and the same for networks without BatchNorm.
        **kwargs: see :class:`~zoo.core.method.Method`.
    """

    def __init__(
        self, momentum: float = 0.999, forward_pass: Literal["joint", "split"] = "joint", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.momentum, self.forward_pass = momentum, forward_pass

    def build(self) -> None:
        """The network and its average."""
        super().build()
        self.teacher = EMA(self.network, self.momentum)

    def views(self, labeled: Tensor, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the three views; those of the weak view carry no gradient."""
        if self.forward_pass == "joint":
            logits, weak, strong = self.network(torch.cat([labeled, weak, strong])).split(
                [len(labeled), len(weak), len(strong)]
            )
            return logits, weak.detach(), strong
        with torch.no_grad():
            weak = self.network(weak)
        logits, strong = self.network(torch.cat([labeled, strong])).split([len(labeled), len(strong)])
        return logits, weak, strong

    def watch(self, unlabeled: dict[str, Tensor], targets: Tensor, weights: Tensor) -> None:
        """Log the share of unlabeled samples in use, and how often their targets are right where that is known."""
        if not self.logs_now:
            return
        values = {"utilization": weights.mean()}
        if "hidden_label" in unlabeled:
            classes = targets if targets.ndim == 1 else targets.argmax(dim=1)
            right = (classes == unlabeled["hidden_label"]).to(weights.dtype)
            values["pseudo_label_accuracy"] = (weights * right).sum() / weights.sum().clamp_min(1e-8)
        self.observe(**values)

    def baseline(self) -> Supervised:
        """The same network and optimizer on the labels alone, to be compared with."""
        return Supervised(
            momentum=self.momentum,
            network=self.network_recipe,
            num_classes=self.num_classes,
            optimizer=self.optimizer_recipe,
            scheduler=self.scheduler_recipe,
            lr_multipliers=self.lr_multipliers,
            decay_norms_and_biases=self.decay_norms_and_biases,
        )
