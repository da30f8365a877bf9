"""Distilling the Knowledge in a Neural Network.

Hinton, Vinyals and Dean, 2015, https://arxiv.org/abs/1503.02531
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.core.errors import UserError
from zoo.core.method import Method
from zoo.core.network import Network
from zoo.core.teachers import Frozen, has_weights
from zoo.distillation.output_cache import OutputCache
from zoo.losses.distillation import distillation_loss


class KnowledgeDistillation(Method):
    r"""A small student fits the softened predictions of a trained teacher.

    .. math:: L = (1 - \alpha) \tfrac1B \sum_b H(y_b, p(x_b))
        + \alpha T^2 \tfrac1B \sum_b \mathrm{KL}\big( q(x_b; T) \,\|\, p(x_b; T) \big)

    with :math:`p(x; T) = \mathrm{softmax}(z / T)` of the student and q of the teacher, which sees the same view of the
    sample, in evaluation mode and without gradients.

    Conventions that differ in the wild: the paper writes a cross-entropy with soft targets (the same gradient), a
    "considerably lower weight" for the labels, and T² when both are used. mdistiller adds 0.1 of the first term to 0.9
    of the second with T = 4, the defaults here; on ImageNet 0.5, 0.5 and T = 1. Other sums, such as 1 and 0.5, are
    reached by ``label_weight``.

    Batch: ``labeled`` {image, label, index (with ``cache_teacher``)}.

    Args:
        teacher: from the number of classes to a trained :class:`~zoo.core.network.Network`; give it ``weights``: the
            checkpoint of a run, a file or a hub address.
        alpha: α in [0, 1]. With 0 the student learns as by :class:`zoo.Supervised`, bit for bit.
        temperature: T > 0.
        squared: multiply by T², so that α keeps its meaning when T changes.
        label_weight: weight of the labels; ``None`` is 1 - α.
        cache_teacher: run the teacher once for every sample and remember its logits. Right only if a sample always
            comes as the same image, and refused as soon as one does not.
        allow_untrained_teacher: accept a teacher with random weights.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: when training starts with a teacher without weights, or the teacher has other classes.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """

    card = Card(
        title="Distilling the Knowledge in a Neural Network",
        year=2015,
        paper="arXiv:1503.02531",
        family="distillation",
        roles=("labeled",),
    )
    teacher_trained: Tensor

    def __init__(
        self,
        teacher: Callable[[int], Network],
        alpha: float = 0.9,
        temperature: float = 4.0,
        squared: bool = True,
        label_weight: float | None = None,
        cache_teacher: bool = False,
        allow_untrained_teacher: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"KnowledgeDistillation: alpha={alpha} must lie in [0, 1]")
        if temperature <= 0:
            raise ValueError(f"KnowledgeDistillation: temperature={temperature} must be positive")
        self.teacher_recipe, self.alpha, self.temperature, self.squared = teacher, alpha, temperature, squared
        self.label_weight = 1.0 - alpha if label_weight is None else label_weight
        self.cache = OutputCache("KnowledgeDistillation: cache_teacher=True") if cache_teacher else None
        self.allow_untrained_teacher = allow_untrained_teacher

    def build(self) -> None:
        """The student and the frozen teacher."""
        super().build()
        with torch.random.fork_rng(devices=[]):  # what is random afterwards does not depend on the teacher
            teacher = self.teacher_recipe(self.num_classes)
        if (outputs := getattr(teacher, "num_outputs", self.num_classes)) != self.num_classes:
            raise UserError(f"KnowledgeDistillation: the teacher has {outputs} classes, the data {self.num_classes}")
        self.frozen_teacher = Frozen(teacher)  # not `teacher`: that name is the average which is evaluated
        self.register_buffer("teacher_trained", torch.tensor(has_weights(self.teacher_recipe)))

    def on_fit_start(self) -> None:
        """Refuse to learn from a teacher that never learned; a checkpoint says whether its teacher did."""
        if not (self.allow_untrained_teacher or bool(self.teacher_trained)):
            raise UserError(
                "KnowledgeDistillation: the teacher has random weights. Give its recipe `weights: PATH` (the "
                "checkpoint of a run), or say allow_untrained_teacher=True"
            )

    def teach(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher's logits (B, C), computed or remembered."""
        if self.cache is None:
            return self.frozen_teacher(batch["image"])
        return self.cache(self.frozen_teacher, batch["image"], batch["index"])

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels and the teacher."""
        labeled = batch["labeled"]
        logits = self.network(labeled["image"])
        taught = self.teach(labeled)
        self.observe(agreement=(logits.detach().argmax(1) == taught.argmax(1)).float().mean())
        return self.report(
            supervised=self.label_weight * cross_entropy(logits, labeled["label"]),
            distillation=self.alpha * distillation_loss(logits, taught, self.temperature, self.squared),
        )
