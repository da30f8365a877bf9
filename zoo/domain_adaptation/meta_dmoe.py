"""Meta-DMoE: Adapting to Domain Shift by Meta-Distillation from Mixture-of-Experts.

Zhong et al., NeurIPS 2022, https://arxiv.org/abs/2210.03885
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from zoo.core.card import Card
from zoo.core.errors import UserError, check_choice
from zoo.core.experts import Aggregator, Experts
from zoo.core.modes import evaluating
from zoo.core.network import Network
from zoo.core.teachers import has_weights
from zoo.domain_adaptation.test_time import TestTimeAdaptation
from zoo.losses.domain_means import domain_rows
from zoo.optim.virtual import averaged_gradients, with_parameters


class MetaDMoE(TestTimeAdaptation):
    r"""A student that learns to be taught, without labels and in one step, by experts of other domains.

    An aggregator A of the experts' features :math:`M(x)` gives the student's features :math:`f` a target. In every
    source domain, with the expert that knows this domain masked, the student makes a step on some samples, and is
    judged by the labels of the others:

    .. math:: \theta_s = \theta - \alpha \nabla_\theta \operatorname{mean} \big( A(M_{\setminus s}(x_s)) - f_\theta(x_s)
        \big)^2, \qquad L = \tfrac1S \sum_s H\big(y_s', h(f_{\theta_s}(x_s'))\big)

    L is minimised in :math:`\theta`, the head h and the aggregator, through the step; h does not take part in the step.
    When tested, the step is made once, on the first batch of the test set and with all experts, and all of the set is
    predicted with where it led.

    The experts are trained before, each on domains of its own: ordinary runs, see
    ``configs/pipelines/meta_dmoe_rotated_mnist5k.yaml``. The first part of this run trains the student on all labels,
    and the aggregator, by a linear head of its own, on the experts' features of all domains. Networks are in evaluation
    mode and 32 bits in the second part, as in the authors' code. There a batch has one domain; here all have their
    episode in every step, and each rank has its own.

    Batch: ``source`` {image, label, domain}, as many samples of every domain; at test {image, label}.

    Args:
        experts: recipes of the experts, at least 2, with ``weights`` and with as many features as the student.
        owners: of every source domain the number of the expert that was trained on it.
        inner_lr: α > 0. The authors' 3e-4 to 1e-3 is for networks of 2048 features.
        support: share of a domain's samples on which the step is made, in (0, 1); 24 of 40 for the authors.
        mask: ``"drop"`` leaves the expert out, as in the authors' code; ``"zero"`` makes its features 0, as in the
            paper's algorithm 1.
        order: ``"first"`` takes the step for a constant; the aggregator then learns nothing.
        warmup: share of training before, in [0, 1].
        aggregator_weight: of the aggregator's own labels after that; 0 for the authors.
        aggregator_depth: layers of the transformer.
        aggregator_heads: attention heads, which divide the number of features.
        aggregator_dropout: rate of its dropout.
        allow_untrained_experts: accept experts with random weights.
        **kwargs: see :class:`~zoo.domain_adaptation.test_time.TestTimeAdaptation`. After the first part, the authors'
            aggregator learns at 1/30 (iWildCam) to 3 times (RxRx1) the student's rate: ``lr_multipliers``.

    Raises:
        UserError: if an argument is out of its range; before training, for untrained experts; in training, for unequal
            numbers of samples.

    Source: Zhong et al. 2022, arXiv 2210.03885, algorithm 1, equations 1-3.
    """

    card = Card(
        title="Meta-DMoE: Adapting to Domain Shift by Meta-Distillation from Mixture-of-Experts",
        year=2022,
        paper="arXiv:2210.03885",
        family="domain_adaptation",
        roles=("source",),
    )
    experts_trained: Tensor

    def __init__(
        self,
        experts: list[Callable[[int], Network]],
        owners: list[int],
        inner_lr: float = 3e-4,
        support: float = 0.6,
        mask: Literal["drop", "zero"] = "drop",
        order: Literal["first", "second"] = "second",
        warmup: float = 0.5,
        aggregator_weight: float = 0.0,
        aggregator_depth: int = 1,
        aggregator_heads: int = 16,
        aggregator_dropout: float = 0.1,
        allow_untrained_experts: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if len(experts) < 2:
            raise UserError(f"MetaDMoE: experts are {len(experts)}, but one may be masked: give at least 2")
        if not owners or not all(0 <= owner < len(experts) for owner in owners):
            raise UserError(f"MetaDMoE: owners={owners} must be numbers of experts below {len(experts)}, one a domain")
        check_choice("MetaDMoE", "mask", mask, ("drop", "zero"))
        check_choice("MetaDMoE", "order", order, ("first", "second"))
        if not inner_lr > 0.0 or not 0.0 < support < 1.0:
            raise UserError(f"MetaDMoE: inner_lr={inner_lr} must be positive and support={support} lie in (0, 1)")
        if not 0.0 <= warmup <= 1.0 or not aggregator_weight >= 0.0:
            raise UserError(
                f"MetaDMoE: warmup={warmup} must lie in [0, 1] and aggregator_weight={aggregator_weight} be at least 0"
            )
        self.expert_recipes, self.owners, self.inner_lr, self.support = experts, owners, inner_lr, support
        self.mask, self.order, self.warmup, self.aggregator_weight = mask, order, warmup, aggregator_weight
        self.aggregator_arguments = (aggregator_depth, aggregator_heads, aggregator_dropout)
        self.allow_untrained_experts = allow_untrained_experts
        self.stepped = False  # whether the copy has made its step

    # What is built ----------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """The student, the frozen experts, and the aggregator of their features with a linear head."""
        super().build()
        width = self.network.num_features
        self.aggregator = Aggregator(width, *self.aggregator_arguments)
        self.aggregator_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.num_classes))
        with torch.random.fork_rng(devices=[]):  # what is random afterwards does not depend on the experts
            experts = [recipe(self.num_classes) for recipe in self.expert_recipes]
        self.experts = Experts(experts, self.owners, width)
        self.register_buffer("experts_trained", torch.tensor(all(map(has_weights, self.expert_recipes))))

    def setup(self, stage: str) -> None:
        """Check that the data has as many source domains."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "num_domains", len(self.owners))
        if stage == "fit" and found != len(self.owners):
            raise UserError(f"MetaDMoE: owners={self.owners} names {len(self.owners)} domains, the data has {found}")

    def on_fit_start(self) -> None:
        """Refuse to learn from experts that never learned; a checkpoint says whether its experts did."""
        super().on_fit_start()
        if not (self.allow_untrained_experts or bool(self.experts_trained)):
            raise UserError(
                "MetaDMoE: experts have random weights. Give every recipe `weights: PATH` (the checkpoint of a run), "
                "or say allow_untrained_experts=True"
            )

    # What is computed -------------------------------------------------------------------------------------------------

    def moving(self, network: Network) -> dict[str, nn.Parameter]:
        """What the step moves: all but the head, by name."""
        named = network.named_parameters()
        return {name: p for name, p in named if p.requires_grad and not name.startswith("head.")}

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels; later, fit them after a step without labels."""
        x, labels, domain = (batch["source"][key] for key in ("image", "label", "domain"))
        if self.progress < self.warmup:
            aggregated = self.aggregator_head(self.aggregator(self.experts(x)))
            return self.report(
                student=cross_entropy(self.network(x), labels), aggregator=cross_entropy(aggregated, labels)
            )
        domains = len(self.owners)
        if len(x) % domains or len(x) < 2 * domains:
            raise UserError(f"MetaDMoE: a batch of {len(x)} is not as many samples, at least 2, of {domains} domains")
        rows = domain_rows(domain, domains)
        count = min(max(round(self.support * rows.shape[1]), 1), rows.shape[1] - 1)
        support, query = rows[:, :count], rows[:, count:]
        tokens = self.experts(x[support.flatten()])
        with evaluating(self.network, self.aggregator), torch.autocast(x.device.type, enabled=False):
            tokens = tokens.to(next(self.network.parameters()).dtype).unflatten(0, (domains, count))
            targets = self.aggregator(self.experts.masked(tokens, self.mask).flatten(0, 1))
            own = self.aggregator_weight * cross_entropy(self.aggregator_head(targets), labels[support.flatten()])
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second order
                # one after the other: finite differences contradict the second order of torch.func.vmap here
                parts = zip(x[support], targets.unflatten(0, (domains, count)), x[query], strict=True)
                logits = torch.cat([self.episode(*part) for part in parts])
        return self.report(query=cross_entropy(logits, labels[query.flatten()]), aggregator=own)

    def episode(self, support: Tensor, targets: Tensor, query: Tensor) -> Tensor:
        """Logits of the query samples of one domain, after the step on the support samples."""
        distance = mse_loss(self.network.features(support), targets)
        named = self.moving(self.network)
        found = torch.autograd.grad(distance, list(named.values()), create_graph=self.order == "second")
        moved = {name: p - self.inner_lr * g for (name, p), g in zip(named.items(), found, strict=True)}
        if self.logs_now:
            with torch.no_grad():
                after = mse_loss(with_parameters(self.network, moved, self.network.features, support), targets)
            self.observe(distance=distance, distance_change=after - distance)  # of the last domain
        return with_parameters(self.network, moved, self.network, query)

    # Test -------------------------------------------------------------------------------------------------------------

    def prepare_copy(self, network: Network) -> dict[str, nn.Parameter]:
        """All but the head adapts."""
        self.stepped = False
        for parameter in network.parameters():
            parameter.requires_grad_()
        return self.moving(network)

    def adapt(self, x: Any) -> Tensor:
        """Make the step where this is the copy's first batch; predict."""
        if not self.stepped:
            self.stepped = True
            named = self.now.named
            loss = mse_loss(self.adapted.features(x), self.aggregator(self.experts(x)).detach())
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(loss, list(named.values()))
            gradients = averaged_gradients(dict(zip(named, found, strict=True)))
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.sub_(self.inner_lr * gradients[name])
            torch.clear_autocast_cache()  # it holds 16-bit casts of before the step
        with torch.no_grad():
            return self.adapted(x)
