"""On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion.

Fan et al., NeurIPS 2024, https://arxiv.org/abs/2406.15480
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from zoo.core.card import Card
from zoo.core.errors import UserError, check_choice
from zoo.core.logit_fusion import Objective, Shift, fuse
from zoo.core.method import Method
from zoo.core.network import Network
from zoo.core.teachers import Frozen, has_weights

__all__ = ["FusionProcessor", "LogitsFusion"]


class LogitsFusion(Method):
    r"""A large network predicts as if it were fine-tuned, by what fine-tuning has done to small ones.

    .. math:: \mathrm{softmax}\Big( M(x) + \sum_t \alpha_t(x) \, (m_t(x) - m(x)) \Big)

    M is the large network, m a small one of the same knowledge, :math:`m_t` the small one fine-tuned on task t. The
    weights are found anew for every sample, such that the large network moves as far as the small ones were moved: see
    :func:`~zoo.core.logit_fusion.fusion_weights`. Nothing is trained for it: ``zoo test`` and ``zoo predict`` take
    networks with ``weights``, ``network`` the large one's among them. ``zoo fit`` trains the large network alone, as
    :class:`zoo.Supervised` does, and looks at the fusion in validation.

    A test logs, beside the ``accuracy`` of the fusion, ``large_accuracy`` and ``expert_<t>_accuracy`` of its parts. For
    language models, see :class:`FusionProcessor`.

    Batch: ``labeled`` {image, label}.

    Args:
        experts: recipes of the fine-tuned small networks, with ``weights``.
        bases: recipes of what each was before, with ``weights``; one if it is the same for all.
        fusion_weights: ``"dynamic"``, or static weights: one number, or one for each expert.
        objective: what dynamic weights solve, see :func:`~zoo.core.logit_fusion.fusion_weights`.
        shift: how far several experts go together, likewise.
        max_weight: of an expert, > 0.
        allow_untrained_experts: accept experts and bases with random weights.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: for a value out of range, and for experts without weights when they are first used.

    Source: Fan et al. 2024, arXiv 2406.15480; what of it is verified is said at
        :func:`~zoo.core.logit_fusion.fusion_weights`. The static form: Liu et al. 2024, "Tuning Language Models by
        Proxy", arXiv 2401.08565.
    """

    card = Card(
        title="On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion",
        year=2024,
        paper="arXiv:2406.15480",
        family="weak_to_strong",
        roles=("labeled",),
    )
    experts_trained: Tensor

    def __init__(
        self,
        experts: list[Callable[[int], Network]],
        bases: list[Callable[[int], Network]],
        fusion_weights: Literal["dynamic"] | float | list[float] = "dynamic",
        objective: Objective = "forward",
        shift: Shift = "mean",
        max_weight: float = 2.0,
        allow_untrained_experts: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not experts or len(bases) not in (1, len(experts)):
            raise UserError(
                f"LogitsFusion: {len(bases)} bases for {len(experts)} experts; one for each, or one for all"
            )
        if isinstance(fusion_weights, str):
            check_choice("LogitsFusion", "fusion_weights", fusion_weights, ("dynamic",))
        elif isinstance(fusion_weights, list) and len(fusion_weights) != len(experts):
            raise UserError(
                f"LogitsFusion: fusion_weights={fusion_weights} must be {len(experts)}, one for each expert"
            )
        check_choice("LogitsFusion", "objective", objective, ("forward", "symmetric"))
        check_choice("LogitsFusion", "shift", shift, ("mean", "max"))
        if not max_weight > 0:
            raise UserError(f"LogitsFusion: max_weight={max_weight} must be positive")
        self.expert_recipes, self.base_recipes, self.fusion_weights = experts, bases, fusion_weights
        self.objective, self.shift, self.max_weight = objective, shift, max_weight
        self.allow_untrained_experts = allow_untrained_experts

    def build(self) -> None:
        """The large network and the frozen small ones."""
        super().build()
        with torch.random.fork_rng(devices=[]):  # what is random afterwards does not depend on them
            self.experts = nn.ModuleList(Frozen(recipe(self.num_classes)) for recipe in self.expert_recipes)
            self.bases = nn.ModuleList(Frozen(recipe(self.num_classes)) for recipe in self.base_recipes)
        recipes = [*self.expert_recipes, *self.base_recipes]
        self.register_buffer("experts_trained", torch.tensor(all(map(has_weights, recipes))))

    def on_validation_start(self) -> None:
        """Refuse experts that never learned; a checkpoint says whether its experts did."""
        if not (self.allow_untrained_experts or bool(self.experts_trained)):
            raise UserError(
                "LogitsFusion: experts or bases have random weights. Give every recipe `weights: PATH` (the checkpoint "
                "of a run), or say allow_untrained_experts=True"
            )

    on_test_start = on_predict_start = on_validation_start

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """The large network learns the labels; nothing else learns."""
        labeled = batch["labeled"]
        return self.report(supervised=cross_entropy(self.network(labeled["image"]), labeled["label"]))

    def parts(self, x: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits (B, C) of the large network, of each expert and of each base."""
        return self.network(x), [expert(x) for expert in self.experts], [base(x) for base in self.bases]

    def fuse(self, large: Tensor, experts: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
        """The fused logits (B, C)."""
        return fuse(large, experts, bases, self.fusion_weights, self.objective, self.shift, self.max_weight)

    def forward(self, x: Any) -> Tensor:
        """Fused logits (B, C)."""
        return self.fuse(*self.parts(x))

    def build_metrics(self) -> MetricCollection:
        """Accuracy of the fusion and of its parts."""
        names = ["accuracy", "large_accuracy", *(f"expert_{t}_accuracy" for t in range(len(self.expert_recipes)))]
        made = {name: MulticlassAccuracy(self.num_classes, average="micro") for name in names}
        return MetricCollection(made, compute_groups=False)  # type: ignore[arg-type]

    def evaluate(self, batch: Any, metrics: MetricCollection) -> None:
        """Each part by itself, and together."""
        large, experts, bases = self.parts(batch["image"])
        made = [self.fuse(large, experts, bases), large, *experts]
        names = ["accuracy", "large_accuracy", *(f"expert_{t}_accuracy" for t in range(len(experts)))]
        for name, logits in zip(names, made, strict=True):
            metrics[name].update(logits, batch["label"])  # type: ignore[operator]


class FusionProcessor:
    """Fuses small language models into the generation of a large one.

    ``large.generate(..., logits_processor=[FusionProcessor([expert], [base])])`` with models of transformers that share
    one vocabulary. Each new token costs a pass of every small model over that token alone: they keep their own caches,
    which are dropped where the ids are not those seen last and one more, as with a new prompt or moved beams.

    Args:
        experts: fine-tuned small models of transformers.
        bases: what each was before; one if it is the same for all.
        attention_mask: (B, P) of the prompt, 0 where it is filled up; needed where prompts differ in length.
        weights: see :func:`~zoo.core.logit_fusion.fuse`, as are the others.
        objective: what dynamic weights solve.
        shift: how far several experts go together.
        max_weight: of an expert, > 0.
        use_cache: keep what the small models have read.

    Source: Fan et al. 2024, arXiv 2406.15480.
    """

    def __init__(
        self,
        experts: Sequence[Any],
        bases: Sequence[Any],
        attention_mask: Tensor | None = None,
        weights: Literal["dynamic"] | float | Sequence[float] = "dynamic",
        objective: Objective = "forward",
        shift: Shift = "mean",
        max_weight: float = 2.0,
        use_cache: bool = True,
    ) -> None:
        self.experts, self.bases, self.attention_mask = list(experts), list(bases), attention_mask
        self.weights, self.objective, self.shift, self.max_weight = weights, objective, shift, max_weight
        self.use_cache = use_cache
        self._caches: list[Any] = []
        self._seen: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) of the next token, fused, from the ids so far (B, N) and the large model's."""
        models = [*self.experts, *self.bases]
        follows = self.use_cache and self._seen is not None and torch.equal(input_ids[:, :-1], self._seen)
        if not follows:
            self._caches = [None] * len(models)
        self._seen = input_ids
        mask = torch.ones_like(input_ids)
        if self.attention_mask is not None:
            mask[:, : self.attention_mask.shape[1]] = self.attention_mask
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        new = slice(-1, None) if follows else slice(None)
        made = []
        for number, model in enumerate(models):
            output = model(
                input_ids=input_ids[:, new], attention_mask=mask, position_ids=positions[:, new],
                past_key_values=self._caches[number], use_cache=self.use_cache, logits_to_keep=1,
            )  # fmt: skip
            self._caches[number] = output.past_key_values if self.use_cache else None
            made.append(output.logits[:, -1].to(scores.device))
        experts, bases = made[: len(self.experts)], made[len(self.experts) :]
        fused = fuse(scores, experts, bases, self.weights, self.objective, self.shift, self.max_weight)
        return fused.to(scores.dtype)
