"""Learning from Future: A Novel Self-Training Framework for Semantic Segmentation (FST).

Du et al., NeurIPS 2022, https://arxiv.org/abs/2209.06993
"""

from contextlib import nullcontext
from functools import reduce
from operator import add
from typing import Any, Literal

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, stack

from zoo.core.card import Card
from zoo.core.errors import UserError, suggest
from zoo.core.wrapper import MethodRecipe, Wrapper
from zoo.optim.virtual import (
    Virtual,
    averaged_gradients,
    check_virtual,
    clipped_gradients,
    kept_buffers,
    virtual_gradients,
    virtual_start,
    virtual_step,
    with_parameters,
)

Batch = dict[str, dict[str, Tensor]]


class FST(Wrapper):
    r"""The teacher follows steps that the student has yet to make, and labels the real step from that future.

    .. math:: \tilde\theta_k = \tilde\theta_{k-1} - \eta \nabla L(\tilde\theta_{k-1}; \phi), \quad
        \phi \leftarrow m \phi + (1 - m) \tilde\theta_k \quad (k = 1 \ldots K, \ \tilde\theta_0 = \theta), \qquad
        \theta \leftarrow \theta - \eta \nabla L(\theta; \phi)

    :math:`\nabla` stands for the optimizer's step and :math:`L` for the loss of the inner method, whose targets come
    from the teacher :math:`\phi`. ``deep`` is the line above. ``wide`` makes K single steps from the same
    :math:`\theta` on other samples, and :math:`\phi` moves once, to their mean. After the real step :math:`\phi` moves
    towards :math:`\theta` as ever: 1 + K moves a step if deep, 2 if wide.

    The virtual steps leave nothing but the teacher behind: parameters, gradients, the optimizer's state, running
    statistics and the policy's state are what they were. In ``deep`` the first of them shares its forward pass with the
    real step, so K = 1 costs one more backward pass and one more teacher pass, and K costs K forward passes.
    ``wide`` takes its samples from the batch: every role is dealt out to K + 1 parts, the first for the real step, so
    its batches must be K + 1 times as large. K = 0 is the inner method.

    Batch: that of the inner method.

    Args:
        method: the inner method, whose teacher must label: ``MeanTeacher``, ``FixMatch`` with ``labeler: teacher``,
            ``SelfEnsembling`` of domain adaptation, or any other :class:`~zoo.core.parts.InParts`.
        steps: K ≥ 0.
        mode: ``"deep"`` or ``"wide"``.
        restore: ``False`` follows the authors' code, in which only the parameters are restored: the optimizer's moments
            and step counts, running statistics and the policy's state go on through the virtual steps, and the real
            step has a forward pass of its own.
        virtual_lr: :math:`\eta` of the virtual steps; the optimizer's own of the moment unless given.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: for an argument out of its range, or an inner method without those parts; before training, for
            ``accumulate_grad_batches``, 16-bit precision other than bfloat16, sharded strategies, and optimizers that
            are not torch's.

    Source: Du et al. 2022, arXiv 2209.06993, section 3; order of the updates as in the authors' code.
    """

    card = Card(
        title="Learning from Future: A Novel Self-Training Framework for Semantic Segmentation",
        year=2022,
        paper="arXiv:2209.06993",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self,
        method: MethodRecipe,
        steps: int = 3,
        mode: Literal["deep", "wide"] = "deep",
        restore: bool = True,
        virtual_lr: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(method=method, **kwargs)
        if steps < 0:
            raise UserError(f"FST: steps={steps} must not be negative")
        if mode not in ("deep", "wide"):
            raise UserError(f"FST: mode={mode!r} must be 'deep' or 'wide'.{suggest(mode, ['deep', 'wide'])}")
        if virtual_lr is not None and virtual_lr < 0.0:
            raise UserError(f"FST: virtual_lr={virtual_lr} must not be negative")
        check_parts(self.method)
        self.steps, self.mode, self.restore, self.virtual_lr = steps, mode, restore, virtual_lr

    def setup(self, stage: str) -> None:
        """Refuse what the virtual steps cannot follow."""
        super().setup(stage)
        if stage != "fit" or not self.steps:
            return
        if (batches := self.trainer.accumulate_grad_batches) != 1:
            raise UserError(f"FST: accumulate_grad_batches={batches} must be 1, as every step looks ahead of itself")
        if (precision := str(self.trainer.precision)).startswith("16"):
            raise UserError(f"FST: precision={precision} scales the loss, virtual steps do not: take bf16-mixed or 32")
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy) and type(strategy) is not DDPStrategy:
            raise UserError(f"FST: {type(strategy).__name__} may shard the parameters that virtual ones stand for: ddp")

    def on_fit_start(self) -> None:
        """Check the optimizer."""
        super().on_fit_start()
        if self.steps:
            check_virtual(self.optimizer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Send the teacher ahead; then learn from what it says."""
        method, outputs = self.method, None
        if self.steps:
            batch, *others = deal(batch, self.steps + 1) if self.mode == "wide" else [batch]
            if self.mode == "deep":
                outputs = method.student(batch)
            teachers = [teacher for teacher, _ in self.teacher_pairs]
            with kept_buffers(method, but=teachers) if self.restore else nullcontext():
                virtual = self.look_deep(batch, outputs) if self.mode == "deep" else self.look_wide(others)
            if not self.restore:
                self.optimizer.state.update({p: virtual.state[name] for name, p in self.moving.items()})
        if outputs is None or not self.restore:
            outputs = method.student(batch)
        return method.learn(batch, outputs, method.targets(batch, outputs))

    def look_deep(self, batch: Batch, outputs: Any) -> Virtual:
        """K steps one after the other, the teacher following each; the student's first ``outputs`` are known."""
        virtual = virtual_start(self.optimizer, self.moving)
        for k in range(self.steps):
            if k:
                outputs = with_parameters(self.method, virtual.parameters, self.method.student, batch)
            virtual = self.step(virtual, batch, outputs, keep_graph=k == 0 and self.restore)
            self.lead(virtual.parameters)
        return virtual

    def look_wide(self, batches: list[Batch]) -> Virtual:
        """A step from here on each batch; the teacher follows their mean."""
        start = virtual = virtual_start(self.optimizer, self.moving)
        ends = []
        for batch in batches:
            begin = start if self.restore else Virtual(start.parameters, virtual.state)
            virtual = self.step(begin, batch, self.method.student(batch))
            ends.append(virtual.parameters)
        self.lead({name: stack([end[name].detach() for end in ends]).mean(dim=0) for name in start.parameters})
        return virtual

    def step(self, start: Virtual, batch: Batch, outputs: Any, keep_graph: bool = False) -> Virtual:
        """A virtual step, by the gradients that a real one would have: the mean of all ranks, and clipped alike."""
        terms = self.method.losses(batch, outputs, self.method.targets(batch, outputs))
        gradients = virtual_gradients(reduce(add, terms.values()), start.parameters, keep_graph)
        clip: Any = self.trainer.gradient_clip_algorithm
        gradients = clipped_gradients(
            averaged_gradients(gradients), self.trainer.gradient_clip_val, clip and clip.value
        )
        return virtual_step(self.optimizer, self.moving, start, gradients, self.virtual_lr)

    def lead(self, parameters: dict[str, Tensor]) -> None:
        """Move every teacher towards where its student would be."""
        there = {id(p): parameters[name].detach() for name, p in self.moving.items()}
        for teacher, student in self.teacher_pairs:
            teacher.approach([there.get(id(p), p) for p in student.parameters()])

    @property
    def moving(self) -> dict[str, Any]:
        """The parameters that learn, by the inner method's names."""
        return {name: p for name, p in self.method.named_parameters() if p.requires_grad}

    @property
    def optimizer(self) -> Any:
        """Torch's own, without the Trainer's wrapping: it is read, never asked to step."""
        return self.optimizers(use_pl_optimizer=False)


def deal(batch: Any, parts: int) -> list[Any]:
    """Rows of every tensor dealt out in turn to ``parts`` batches of equal size.

    Raises:
        UserError: if a tensor's rows cannot be shared out evenly.
    """

    def check(x: Tensor) -> None:
        if len(x) % parts:
            raise UserError(f"FST: mode=wide deals {len(x)} samples out to {parts} parts (steps + 1): not even")

    apply_to_collection(batch, Tensor, check)
    return [apply_to_collection(batch, Tensor, lambda x, i=i: x[i::parts]) for i in range(parts)]


def check_parts(method: Any) -> None:
    """Refuse a method whose step is not ``student``, ``targets`` and ``losses``, or whose teacher does not label.

    Raises:
        UserError: saying which.
    """
    name, order = type(method).__name__, type(method).__mro__
    owner = {part: next((i for i, cls in enumerate(order) if part in vars(cls)), -1) for part in PARTS}
    missing = [part for part in PARTS if owner[part] < 0]
    if missing or owner["training_step"] < owner["losses"]:
        why = f"it has no {missing[0]}()" if missing else "its training_step() is its own"
        raise UserError(f"FST: method={name} cannot be asked in parts, as {why}; MeanTeacher and FixMatch can")
    if getattr(method, "labeler", "teacher") == "student":
        raise UserError(f"FST: in method={name} the student labels: give it labeler: teacher")


PARTS = ("student", "targets", "losses", "learn", "training_step")
