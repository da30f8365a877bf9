"""Pareto Domain Adaptation (ParetoDA).

Lv et al., NeurIPS 2021, https://arxiv.org/abs/2112.04137
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.distributed import mean_across_ranks
from zoo.core.errors import UserError
from zoo.core.wrapper import MethodRecipe, Wrapper
from zoo.domain_adaptation.discriminators import ClassDiscriminators
from zoo.losses.mimicking import class_domain_loss, mutual_information, refined_log_probabilities
from zoo.optim.pareto import pareto_weights, with_gradients
from zoo.optim.partial import PartialSteps, refuse_shards

_CHUNK = 2**16  # columns whose products are taken at once: they stay in the cache


class ParetoDA(Wrapper):
    r"""Source labels, alignment and certainty on the target pull the features by weights that serve unseen target data.

    .. math:: d = 3\, (w_S \nabla L_S + w_D \nabla L_D + w_T \nabla L_T), \qquad L_T = -I(\rho^t), \quad
        L_{\text{val}} = \log C - I(\rho^{\text{held out}})

    d moves the features alone; w solves the linear program of :func:`~zoo.optim.pareto.pareto_weights`, whose guide is
    the gradient of :math:`L_{\text{val}}` on target samples that no other loss ever sees. :math:`L_S` is the inner
    method's term ``source``, :math:`L_D` the sum of its others, :math:`I` the mutual information of samples and
    classes, :math:`\rho` the predictions refined by one domain discriminator a class. Heads and discriminators follow
    the plain gradients of :math:`L_S`, :math:`L_D` and the class-wise domain loss. Equal weights are the plain sum.

    The paper writes :math:`L_{\text{val}} = -I` and lets the guide count where it is positive, which it never is:
    counted from its smallest value, :math:`-\log C`, it is 0 where the held-out predictions are certain and balanced,
    and positive before. The authors' code never uses its guide.

    Gradients of four losses at every step. With ``forward_pass: split`` every domain has two passes back instead of
    one, and the held-out samples one forward and one back, which is 13/6 of the inner method's passes where they are as
    many as the source's, and 23/12 where they are half as many; ``joint`` has three passes back through both domains,
    17/6 and 31/12. Batch statistics do not see the held-out samples. With ``every`` above 1 the steps from one linear
    program to the next take its weights, and one pass back each.

    Batch: that of the inner method, and ``held_out`` {image} of the target, as
    :class:`~datamodules.held_out.HeldOutDomainData` gives it.

    Args:
        method: the recipe of a method of ``source`` and ``target`` that passes both once a step and reports the loss of
            the labels as ``source``, such as DANN, CDAN, MDD, DAN or MCC.
        discriminators: from the numbers of features and classes to a module with a domain logit for every class.
        guided: ``False`` lets no guide count, as in the authors' code: every loss then falls.
        tolerance: the value of :math:`L_{\text{val}}` up to which it counts as 0.
        plain_gradients: ``True`` adds :math:`\nabla L_S + \nabla L_D` to d, as the authors' code does. Without them a
            network that knows nothing yet may follow :math:`L_T` alone, and be certain before it is right.
        every: steps from one linear program to the next, counted from the start of an epoch; 1 as in the paper.
        **kwargs: see :class:`~zoo.core.method.Method`.

    Raises:
        UserError: for such an argument; before training, for sharded strategies; at the first step, without held-out
            samples, or if the inner method's step is of another kind.

    Source: Lv et al. 2021, arXiv 2112.04137; the factor 3, so that equal weights are the sum, as in the authors' code.
    """

    card = Card(
        title="Pareto Domain Adaptation",
        year=2021,
        paper="arXiv:2112.04137",
        family="domain_adaptation",
        roles=("source", "target", "held_out"),
    )

    def __init__(
        self,
        method: MethodRecipe,
        discriminators: Callable[[int, int], nn.Module] = ClassDiscriminators,
        guided: bool = True,
        tolerance: float = 1e-3,
        plain_gradients: bool = False,
        every: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(method=method, **kwargs)
        if tolerance < 0:
            raise UserError(f"ParetoDA: tolerance={tolerance} must not be negative")
        if every < 1:
            raise UserError(f"ParetoDA: every={every} must be at least 1")
        if isinstance(self.method, PartialSteps) or not hasattr(self.method, "both"):
            name = type(self.method).__name__
            raise UserError(f"ParetoDA: method={name} takes steps of its own kind; DANN, CDAN or MDD can be combined")
        self.discriminators_recipe, self.guided, self.tolerance = discriminators, guided, tolerance
        self.plain_gradients, self.every = plain_gradients, every
        self._memory: tuple[Tensor, list[Tensor]] | None = None

    def build(self) -> None:
        """The inner method's networks, and beside them, in its state, the discriminators of single classes."""
        super().build()
        with torch.random.fork_rng(devices=[]):
            self.method.class_discriminators = self.discriminators_recipe(self.network.num_features, self.num_classes)
        self.method.register_buffer("pareto_weights", torch.full((3,), 1 / 3))

    def setup(self, stage: str) -> None:
        """Refuse strategies that shard."""
        super().setup(stage)
        if stage == "fit":
            refuse_shards(self)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """The weights at which the features follow the losses; heads as ever."""
        if "held_out" not in batch:
            raise UserError("ParetoDA: there are no held-out target samples; take HeldOutDomainData")
        terms, source, target = self.ask(batch, batch_idx)
        label_loss, alignment = terms.pop("source"), reduce(add, terms.values())
        domains = self.method.class_discriminators(torch.cat([source, target]).detach())
        refined = refined_log_probabilities(self.network.logits(target), domains[len(source) :])
        class_domains = class_domain_loss(
            domains[: len(source)], domains[len(source) :], batch["source"]["label"], refined.exp()
        )
        losses = [label_loss, alignment, -mutual_information(refined)]

        shared, others = self.shared_and_others()
        plain = gradients_of(label_loss + alignment + class_domains, others)  # stops at the features
        if batch_idx % self.every == 0:
            moves = self.balanced(losses, self.uncertainty(batch["held_out"]["image"]), shared)
        else:
            moves = gradients_of((self.factors() * torch.stack(losses)).sum(), shared)
        terms |= {"source": label_loss, "mimicking": losses[2], "class_domains": class_domains}
        weights = zip(("source", "alignment", "mimicking"), self.method.pareto_weights, strict=True)
        self.observe(**{f"weight_{name}": weight for name, weight in weights})
        loss = self.method.report(**terms)
        return with_gradients(loss, shared + others, moves + plain)

    def uncertainty(self, x: Tensor) -> Tensor:
        """The guide: how far predictions of unseen target samples are from certain and balanced."""
        with frozen_batch_norm(self.method):
            features = self.network.features(x)
            with torch.no_grad():
                own = self.method.class_discriminators(features)
            return math.log(self.num_classes) - mutual_information(
                refined_log_probabilities(self.network.logits(features), own)
            )

    def balanced(self, losses: list[Tensor], guide: Tensor, shared: list[nn.Parameter]) -> list[Tensor]:
        """Gradients of all losses; the weights that the program finds; the direction that they make."""
        shape = (len(losses) + 1, sum(p.numel() for p in shared))
        rows, directions = self.memory(shape, shared[0])
        for loss, row in zip([*losses, guide], rows, strict=True):
            torch.cat([in_memory_order(g, p) for g, p in zip(gradients_of(loss, shared), shared, strict=True)], out=row)
        rows = mean_across_ranks(rows)  # before the program, or every rank has its own weights
        products = torch.stack([part[:-1] @ part.T for part in rows.split(_CHUNK, dim=1)]).sum(dim=0)
        counts = mean_across_ranks(guide.detach()) > self.tolerance if self.guided else False
        weights = pareto_weights(products[:, :-1], products[:, -1], counts)
        self.observe(guide=guide)
        self.method.pareto_weights = weights.to(self.method.pareto_weights.dtype)
        held = {p.grad.untyped_storage().data_ptr() for p in shared if p.grad is not None}
        free = next((one for one in directions if one.untyped_storage().data_ptr() not in held), None)  # or a new one
        direction = torch.mm(self.factors().to(rows.dtype).unsqueeze(0), rows[:-1], out=free)
        parts = direction.squeeze(0).split([p.numel() for p in shared])
        return [as_parameter(part, p) for part, p in zip(parts, shared, strict=True)]

    def memory(self, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Rows for the gradients and two directions; kept, as fresh memory costs as much as what fills it.

        Two, as parameters hold the last direction as their gradient until the next is made.
        """
        kept = self._memory
        if kept is None or (kept[0].shape, kept[0].dtype, kept[0].device) != (shape, like.dtype, like.device):
            kept = self._memory = like.new_empty(shape), [like.new_empty(1, shape[1]) for _ in range(2)]
        return kept

    def factors(self) -> Tensor:
        """What the losses are multiplied by, for the features."""
        plain = self.method.pareto_weights.new_tensor([1.0, 1.0, 0.0]) if self.plain_gradients else 0.0
        return 3.0 * self.method.pareto_weights + plain

    def ask(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The inner method's terms, and the features of both domains that it made on the way."""
        said: dict[str, Tensor] = {}
        made: list[Tensor] = []

        def report(**terms: Tensor) -> Tensor:
            said.update(terms)
            return reduce(add, terms.values())

        hook = self.network.neck.register_forward_hook(lambda *call: made.append(call[-1]))
        self.method.report = report
        try:
            self.method.training_step(batch, batch_idx)
        finally:
            hook.remove()
            del self.method.report
        sizes = [len(batch["source"]["image"]), len(batch["target"]["image"])]
        features = [part for one in made for part in (one.split(sizes) if len(one) == sum(sizes) else [one])]
        if [len(x) for x in features] != sizes or "source" not in said or len(said) < 2:
            name = type(self.method).__name__
            raise UserError(
                f"ParetoDA: method={name} must pass source and target once a step, and report 'source' and another term"
            )
        return said, features[0], features[1]

    def shared_and_others(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that make the features, and all others that learn."""
        shared = [p for part in (self.network.backbone, self.network.neck) for p in part.parameters()]
        known = {id(p) for p in shared}
        others = [p for p in self.method.parameters() if p.requires_grad and id(p) not in known]
        return [p for p in shared if p.requires_grad], others


def gradients_of(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of a loss, each in memory of its own, 0 where it does not depend on a parameter; the graph is kept."""
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    memory = [g.untyped_storage() for g in gradients]
    users = Counter(m.data_ptr() for m in memory)  # autograd gives one tensor to all that were added, or expands it
    shared = [users[m.data_ptr()] > 1 or m.nbytes() < g.nbytes for m, g in zip(memory, gradients, strict=True)]
    return [g.clone() if others else g for g, others in zip(gradients, shared, strict=True)]


def in_memory_order(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient as one row, in the order in which the parameter lies in memory: a view, where both lie alike."""
    return gradient.permute(dimensions(parameter)).reshape(-1)


def as_parameter(row: Tensor, parameter: Tensor) -> Tensor:
    """What :func:`in_memory_order` has laid out, in the parameter's shape again, as a view."""
    order = dimensions(parameter)
    return row.view([parameter.shape[d] for d in order]).permute(sorted(range(len(order)), key=order.__getitem__))


def dimensions(parameter: Tensor) -> list[int]:
    """The dimensions of a parameter, the one that changes slowest in memory first."""
    strides = parameter.stride()
    return sorted(range(len(strides)), key=lambda d: -strides[d])  # equal ones as they stand
