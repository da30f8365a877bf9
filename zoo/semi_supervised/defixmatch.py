"""Don't fear the unlabelled: safe semi-supervised learning via debiasing (DeFixMatch).

Schmutz, Humbert and Mattei, ICLR 2023, https://arxiv.org/abs/2203.07512
"""

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from zoo.core.card import Card
from zoo.semi_supervised.fixmatch import FixMatch


class DeFixMatch(FixMatch):
    r"""FixMatch, less the same term on labeled samples, whose mean is that on unlabeled ones.

    .. math:: L = \tfrac12 \big(\hat{\mathbb E}_x H(y, p(x)) + \hat{\mathbb E}_x H(y, p(A(x)))\big)
        + \lambda \big(\hat{\mathbb E}_u \ell(u) - \hat{\mathbb E}_x \ell(x)\big), \quad
        \ell(u) = w(q)\, H(\hat q, p(A(u))), \; q = p(\alpha(u))

    :math:`\alpha` is the weak view, :math:`A` the strong one. In expectation the bracket is zero, so that L is an
    unbiased estimate of the supervised risk whatever the pseudo-labels are worth, and λ only trades its variance. What
    the policy remembers moves by unlabeled samples alone.

    Batch: ``labeled`` {image, strong, label}, ``unlabeled`` {weak, strong, hidden_label (watched only)}.

    Args:
        policy: from the number of classes to a policy, which maps weak logits (μB, C) to targets and weights (μB,).
        unlabeled_weight: :math:`\lambda` ≥ 0. With 0 it is supervised learning on both views. Above 1/2 a confident,
            right prediction for a labeled sample costs its strong view more than its label gives back, so that the loss
            has no lower bound.
        **kwargs: see :class:`~zoo.semi_supervised.base.SemiSupervised`.

    Source: Schmutz et al. 2023, arXiv 2203.07512, section 3 and, for FixMatch, section 5; supervised on both views as
        in the released code.
    """

    card = Card(
        title="Don't fear the unlabelled: safe semi-supervised learning via debiasing",
        year=2023,
        paper="arXiv:2203.07512",
        family="semi_supervised",
        roles=("labeled", "unlabeled"),
    )
    labeled_views: ClassVar[tuple[str, ...]] = ("image", "strong")

    def pseudo_labeled(self, batch: dict[str, dict[str, Tensor]], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and weights of the labeled samples, as if they had no labels; the policy stays as it is."""
        training = self.policy.training
        self.policy.eval()
        evidence = {**self.evidence(batch, logits), "index": batch["labeled"].get("index")}
        targets, weights = self.policy(logits.detach(), **evidence)
        self.policy.train(training)
        return targets, weights

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Fit the labels; fit the strong views to the confident weak ones, but for what labeled samples lose by it."""
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        logits, labeled_strong, strong, weak = self.together(
            [labeled["image"], labeled["strong"], unlabeled["strong"]], [unlabeled["weak"]]
        )
        targets, weights = self.policy(weak, **self.evidence(batch, logits))
        own_targets, own_weights = self.pseudo_labeled(batch, logits)
        self.watch(unlabeled, targets, weights)
        risk = (weights * cross_entropy(strong, targets, reduction="none")).mean()
        labeled_risk = (own_weights * cross_entropy(labeled_strong, own_targets, reduction="none")).mean()
        both_views = self.criterion(logits, labeled["label"]) + self.criterion(labeled_strong, labeled["label"])
        return self.report(
            supervised=0.5 * both_views,
            unlabeled=self.unlabeled_weight * risk,
            debiasing=-self.unlabeled_weight * labeled_risk,
        )
