"""What the consistency methods share: their batches, one forward over several views, and what they watch."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zoo.core.criteria import Criterion, CrossEntropy, class_counts
from zoo.core.errors import UserError, suggest
from zoo.core.method import Method
from zoo.core.parts import InParts
from zoo.core.teachers import EMA
from zoo.policies import Policy
from zoo.semi_supervised.supervised import Supervised


class SemiSupervised(Method):
    """Base of methods on ``labeled`` {image, label} and ``unlabeled`` {weak, strong, index, hidden_label}.

    ``labeled_views`` and ``unlabeled_views`` name the views that a subclass reads: the data makes these and no others.
    ``weak`` and ``strong``, where several are wanted ``weak_2``, ``strong_2`` and so on; ``image``, of labeled samples,
    is a weak view.

    Args:
        momentum: momentum of the weights' average, which is what is evaluated.
        forward_pass: ``"joint"`` sends labeled, weak and strong views through the network in one batch, as the papers
            do, so that BatchNorm sees them together; ``"split"`` sends what needs no gradient apart and without a
            graph, which is a third cheaper and the same for networks without BatchNorm.
        criterion: what is minimised on labeled samples, from the number of classes to a
            :class:`~zoo.core.criteria.Criterion`.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: if ``momentum`` is outside [0, 1], or for another ``forward_pass``.
    """

    labeled_views: ClassVar[tuple[str, ...]] = ("image",)
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "strong")
    watched: list[tuple[Tensor, Tensor, Tensor | None]] | None = None  # what `watch` is shown, where somebody looks

    def __init__(
        self,
        momentum: float = 0.999,
        forward_pass: Literal["joint", "split"] = "joint",
        criterion: Callable[[int], Criterion] = CrossEntropy,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        if not 0.0 <= momentum <= 1.0:
            raise UserError(f"{name}: momentum={momentum} must lie in [0, 1]")
        if forward_pass not in ("joint", "split"):
            near = suggest(forward_pass, ["joint", "split"])
            raise UserError(f"{name}: forward_pass={forward_pass!r} must be 'joint' or 'split'.{near}")
        self.momentum, self.forward_pass, self.criterion_recipe = momentum, forward_pass, criterion

    def build(self) -> None:
        """The network, its average, and the criterion."""
        super().build()
        self.teacher = EMA(self.network, self.momentum)
        self.criterion = self.criterion_recipe(self.num_classes)

    def on_fit_start(self) -> None:
        """Tell the parts of the method what there is to learn from."""
        if (data := getattr(self.trainer, "datamodule", None)) is not None:
            self.prepare_for(data)

    def prepare_for(self, data: Any) -> None:
        """Tell the criterion the class counts of the labeled samples, and the policies the unlabeled samples' numbers.

        Args:
            data: a data module after ``setup("fit")``, with the roles of this method.
        """
        if (counts := class_counts(data, self.num_classes)) is not None:
            self.criterion.prepare(counts.to(self.device))
        roles = getattr(data, "roles", None)
        if isinstance(roles, dict) and (unlabeled := roles.get("unlabeled")) is not None:
            for policy in self.modules():
                if isinstance(policy, Policy):
                    policy.prepare(unlabeled.samples.ids.to(self.device))

    def together(
        self, learning: Sequence[Tensor], watched: Sequence[Tensor] = (), call: Callable[[Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Outputs for several batches at once: first those that carry a gradient, then those that do not.

        Args:
            learning: inputs whose outputs carry a gradient.
            watched: inputs whose outputs carry none; in a ``"split"`` forward pass they make no graph.
            call: what is called; the network unless given, ``self.network.features`` for instance.
        """
        call = call or self.network
        sizes = [len(x) for x in (*learning, *watched)]
        if self.forward_pass == "joint" or not watched:
            outputs = list(call(torch.cat([*learning, *watched])).split(sizes))
            return [*outputs[: len(learning)], *(output.detach() for output in outputs[len(learning) :])]
        with torch.no_grad():
            apart = call(torch.cat([*watched])).split(sizes[len(learning) :])
        return [*call(torch.cat([*learning])).split(sizes[: len(learning)]), *apart]

    def views(self, labeled: Tensor, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the three views; those of the weak view carry no gradient."""
        logits, strong, weak = self.together([labeled, strong], [weak])
        return logits, weak, strong

    def evidence(self, batch: dict[str, dict[str, Tensor]], logits: Tensor) -> dict[str, Any]:
        """What policies may know of a step beside the unlabeled logits; ``logits`` are those of the labeled samples."""
        labeled = (logits.detach(), batch["labeled"]["label"])
        return {"index": batch["unlabeled"].get("index"), "labeled": labeled}

    def watch(self, unlabeled: dict[str, Tensor], targets: Tensor, weights: Tensor) -> None:
        """Show a step's pseudo-labels: the only place where hidden labels are read, and nothing flows back.

        Logs the share of unlabeled samples in use, and how often their targets are right where that is known. Who
        wants to see every step sets :attr:`watched` to a list, as ``PseudoLabelDiagnostics`` does: (pseudo-labels (B,),
        weights (B,), hidden labels (B,) or None) is added to it, on the device.

        Args:
            unlabeled: the batch; ``hidden_label`` (B,) is -1 where nobody knows it.
            targets: classes (B,), or probabilities (B, C) whose most probable class counts.
            weights: (B,).
        """
        if self.watched is None and not self.logs_now:
            return
        classes = targets.detach() if targets.ndim == 1 else targets.detach().argmax(dim=1)
        weights, hidden = weights.detach(), unlabeled.get("hidden_label")
        if self.watched is not None:
            self.watched.append((classes, weights, hidden))
        if self.logs_now:
            values = {"utilization": weights.mean()}
            if hidden is not None:
                known = weights * (hidden >= 0).to(weights.dtype)
                right = (classes == hidden).to(weights.dtype)
                values["pseudo_label_accuracy"] = (known * right).sum() / known.sum().clamp_min(1e-8)
            self.observe(**values)

    def baseline(self) -> Supervised:
        """The same network and optimizer on the labels alone, to be compared with."""
        return Supervised(
            momentum=self.momentum,
            criterion=self.criterion_recipe,
            network=self.network_recipe,
            num_classes=self.num_classes,
            optimizer=self.optimizer_recipe,
            scheduler=self.scheduler_recipe,
            lr_multipliers=self.lr_multipliers,
            decay_norms_and_biases=self.decay_norms_and_biases,
        )


class TeacherStudent(InParts, SemiSupervised):
    """Base of methods whose targets come from the average of the weights, see :class:`~zoo.core.parts.InParts`."""

    def show(self, batch: dict[str, dict[str, Tensor]], targets: tuple[Tensor, Tensor]) -> None:
        """See :meth:`SemiSupervised.watch`."""
        self.watch(batch["unlabeled"], *targets)
