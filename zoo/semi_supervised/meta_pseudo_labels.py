"""Meta Pseudo Labels.

Pham et al., CVPR 2021, https://arxiv.org/abs/2003.10580
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from zoo.core.batch_norm import frozen_batch_norm
from zoo.core.card import Card
from zoo.core.distributed import mean_across_ranks
from zoo.core.errors import UserError
from zoo.core.schedules import linear_ramp
from zoo.optim.virtual import averaged_gradients, virtual_gradients
from zoo.policies import Policy, Threshold
from zoo.semi_supervised.base import SemiSupervised


def confident(num_classes: int) -> Policy:
    """The targets of the tutor's own consistency: sharpened, where it is 0.6 sure."""
    return Threshold(num_classes, threshold=0.6, temperature=0.7, soft=True)


class MetaPseudoLabels(SemiSupervised):
    r"""A tutor labels for a student, and learns from how well the student does by it.

    .. math:: L_{student} = H(\hat y, S(A(u))), \quad \hat y \sim T(A(u)), \qquad
        L_{tutor} = H(y, T(x)) + r(t)\, \lambda\, w(q)\, H(\hat q, T(A(u))) + h\, H(\hat y, T(A(u))),

    each a mean over its batch, :math:`q = T(\alpha(u))`. The feedback h is what one step on the pseudo-labels makes the
    student better on the labeled samples,

    .. math:: h = H(y, S_\theta(x)) - H(y, S_{\theta'}(x)) \approx \eta\, \nabla_\theta H(y, S(x))^\top
        \nabla_\theta L_{student}, \quad \theta' = \theta - \eta \nabla_\theta L_{student}

    so that pseudo-labels which help become likelier. The step is a virtual one, which is the paper's where the
    optimizer is plain gradient descent at rate η; no network is changed by it, and one optimizer trains both. The
    student sees no label; the paper tunes it on the labels in the end, which is another run.

    Batch: ``labeled`` {image, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: of the tutor's consistency, from the number of classes to a policy, which maps its weak logits (μB, C)
            to targets and weights (μB,).
        consistency_weight: λ ≥ 0.
        feedback_weight: factor of h, ≥ 0; with 0 the student distils a tutor that does not care.
        virtual_rate: η > 0.
        ramp: share of training over which :math:`r` grows from 0 to 1, in [0, 1].
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`; the student's average is evaluated.

    Raises:
        UserError: if an argument is out of its range.

    Source: Pham et al. 2021, arXiv 2003.10580, algorithm 1 and appendix A.
    """

    card = Card(
        title="Meta Pseudo Labels",
        year=2021,
        paper="arXiv:2003.10580",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )

    def __init__(
        self,
        policy: Callable[[int], Policy] = confident,
        consistency_weight: float = 8.0,
        feedback_weight: float = 1.0,
        virtual_rate: float = 0.05,
        ramp: float = 1 / 60,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("consistency_weight", consistency_weight), ("feedback_weight", feedback_weight)):
            if value < 0.0:
                raise UserError(f"MetaPseudoLabels: {name}={value} must not be negative")
        if virtual_rate <= 0.0 or not 0.0 <= ramp <= 1.0:
            raise UserError(
                f"MetaPseudoLabels: virtual_rate={virtual_rate} must be positive and ramp={ramp} lie in [0, 1]"
            )
        self.policy_recipe, self.consistency_weight = policy, consistency_weight
        self.feedback_weight, self.virtual_rate, self.ramp = feedback_weight, virtual_rate, ramp

    def build(self) -> None:
        """The student ``network``, its average, the policy, and the ``tutor`` from the same recipe."""
        super().build()
        self.policy = self.policy_recipe(self.num_classes)
        self.tutor = self.network_recipe(self.num_classes)

    def feedback(self, loss: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """h: how much better the student would be on labeled samples after one step on ``loss``.

        A difference of two losses that are nearly alike: both are taken in the parameters' own precision and with the
        same random numbers, since rounding and other dropped units would move them further apart than the step does.
        """
        parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        gradients = averaged_gradients(virtual_gradients(loss, parameters, keep_graph=True))
        exact = torch.autocast(x.device.type, enabled=False)
        with torch.no_grad(), frozen_batch_norm(self.network), exact:
            moved = {name: parameters[name] - self.virtual_rate * gradient for name, gradient in gradients.items()}
            with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
                before = cross_entropy(self.network(x), labels)
            after = cross_entropy(functional_call(self.network, moved, (x,)), labels)
        return mean_across_ranks(before - after)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """The student fits drawn pseudo-labels; the tutor fits labels, itself, and what helped the student."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        logits, strong, weak = self.together([labeled["image"], unlabeled["strong"]], [unlabeled["weak"]], self.tutor)
        noise = -torch.empty_like(strong).exponential_().log()  # Gumbel: the arg max is a draw from the softmax
        drawn = (strong.detach() + noise).argmax(dim=1)
        student = cross_entropy(self.network(unlabeled["strong"]), drawn)
        feedback = self.feedback(student, labeled["image"], labeled["label"])
        targets, weights = self.policy(weak, **self.evidence(batch, logits))
        self.watch(unlabeled, targets, weights)
        self.observe(helped=feedback)
        consistency = (weights * cross_entropy(strong, targets, reduction="none")).mean()
        return self.report(
            unlabeled=student,
            supervised=self.criterion(logits, labeled["label"]),
            consistency=linear_ramp(self.progress, self.ramp) * self.consistency_weight * consistency,
            feedback=self.feedback_weight * feedback * cross_entropy(strong, drawn),
        )
