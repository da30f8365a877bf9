"""Domains that differ in how frequent their classes are and in nothing else, made of one source; no labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.base import VAL, Data, Role
from datamodules.samplers import EvalSampler, mix
from datamodules.sources.base import Samples, Source
from datamodules.splits import Split, counts, generator
from zoo.core.errors import UserError

PRIORS, DOMAINS, TEST = 11, 12, 13  # purposes of random streams


class LabelShiftData(Data):
    r"""Unlabelled samples of R domains of one size, whose class frequencies :math:`p(y|d)` are drawn at random.

    .. math:: p(\cdot|d) \sim \mathrm{Dirichlet}(\alpha / K, \dots, \alpha / K), \quad
        \operatorname{cond}(p(y|d)) \le \text{max\_condition}

    Small :math:`\alpha` gives domains of few classes. Training, validation and test set follow the same frequencies,
    and no sample is used twice. Domains are as large as the rarest class allows.

    Batch: ``unlabeled`` {image, domain, index, hidden_label}. Validation: ``val``, held-out samples of every domain,
    whose labels are for nobody to use. Test: ``test``; prediction: the same samples with their domains.

    Args:
        source: where samples come from; its labels make the domains and are then hidden.
        num_domains: R, at least the number of classes, else they are not determined.
        alpha: α > 0, the concentration.
        max_condition: largest condition number of p(y|d); drawn again until it holds.
        batch_size: samples per process and step.
        **kwargs: see :class:`~datamodules.base.Data`.

    Raises:
        UserError: for a number out of range; when no draw has such a condition number, or a class has too few samples.

    Source: Roberts et al. 2022, arXiv 2207.13179, section 6: α 0.5, 3, 10; for ten classes R 10 to 25 and condition
    numbers up to 4 (8 for α = 10).
    """

    def __init__(
        self,
        source: Source,
        num_domains: int = 20,
        alpha: float = 3.0,
        max_condition: float = 4.0,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(source, batch_size, **kwargs)
        if num_domains < 2 or alpha <= 0 or max_condition < 1:
            raise UserError(
                f"LabelShiftData: num_domains={num_domains} must be at least 2, alpha={alpha} above 0 and "
                f"max_condition={max_condition} at least 1"
            )
        if self.predict_folder is not None:
            raise UserError("LabelShiftData: predict_folder holds samples of no known domain")
        self.num_domains, self.alpha, self.max_condition = num_domains, alpha, max_condition
        self._priors: Tensor | None = None
        self._divided: dict[str, Samples] = {}

    @property
    def class_given_domain(self) -> Tensor:
        """The true p(y|d), (K, R) float64: for measuring only."""
        if self._priors is None:
            self._priors = draw_priors(
                self.num_classes, self.num_domains, self.alpha, self.max_condition, mix(self.seed, PRIORS)
            )
        return self._priors

    def make_split(self, labels: Tensor) -> Split:
        """Parts ``domain 0`` .. ``domain R-1`` to train on, ``val 0`` .. held out of each."""
        parts: dict[str, Tensor] = {}
        domains = divide(labels, self.class_given_domain, generator(self.seed, DOMAINS))
        size = len(domains[0])
        held = round(self.val_size / len(domains) if isinstance(self.val_size, int) else self.val_size * size)
        if held >= size:
            raise UserError(
                f"LabelShiftData: val_size={self.val_size} leaves nothing of {len(domains)} domains of {size} samples"
            )
        for number, members in enumerate(domains):
            mixed = members[torch.randperm(size, generator=generator(self.seed, VAL, number))]
            parts[f"val {number}"], parts[f"domain {number}"] = mixed[:held].sort().values, mixed[held:].sort().values
        return Split(parts, len(labels), self.seed, self.source.name)

    def make_roles(self) -> dict[str, Role]:
        """One role: ``unlabeled``."""
        view = {"image": self.default_weak(self.source)}
        return {"unlabeled": Role(self._domains("domain"), self.batch_size, view, hidden=True)}

    def evaluation_sets(self, stage: str) -> dict[str, Samples]:
        """``val`` or ``test``."""
        if stage == "test":
            return {"test": self.prediction_set()}
        held = self._domains("val")
        return {"val": held} if len(held) else {}

    def prediction_set(self) -> Samples:
        """Test samples of every domain."""
        if "test" not in self._divided:
            test = self._test(self.source)
            parts = divide(test.labels, self.class_given_domain, generator(self.seed, TEST))
            self._divided["test"] = in_domains(test, parts)
        return self._divided["test"]

    def unlabeled_dataloader(self) -> Any:
        """Training and validation samples of every domain, each once, as evaluated, and all for every process.

        The validation's say so by ``held_out`` (B,) bool.
        """
        parts = [torch.cat([self.parts[f"domain {d}"], self.parts[f"val {d}"]]) for d in range(self.num_domains)]
        samples = in_domains(self._train(self.source), parts)
        held = [torch.arange(len(part)) >= len(self.parts[f"domain {d}"]) for d, part in enumerate(parts)]
        samples = samples.with_columns(held_out=torch.cat(held))
        return self._loader(samples, EvalSampler(samples, self.eval_batch_size, num_replicas=1, rank=0))

    def _domains(self, part: str) -> Samples:
        return in_domains(self._train(self.source), [self.parts[f"{part} {d}"] for d in range(self.num_domains)])


def in_domains(samples: Samples, parts: list[Tensor]) -> Samples:
    """The samples at these positions, domain after domain, with the column ``domain``."""
    numbers = torch.cat([torch.full((len(part),), domain) for domain, part in enumerate(parts)])
    return samples.subset(torch.cat(parts)).with_columns(domain=numbers)


def draw_priors(
    num_classes: int, num_domains: int, alpha: float, max_condition: float, seed: int, tries: int = 100_000
) -> Tensor:
    """p(y|d), (K, R) float64 with columns that sum to 1, well enough conditioned.

    Args:
        num_classes: K.
        num_domains: R.
        alpha: α; every class has the parameter α / K.
        max_condition: largest condition number.
        seed: decides everything.
        tries: draws before giving up.

    Raises:
        UserError: when no draw is good enough; the message has the best condition number.
    """
    import numpy as np

    stream, best, chunk = np.random.default_rng(seed), float("inf"), 1_000
    for _ in range(-(-tries // chunk)):
        drawn = stream.dirichlet(np.full(num_classes, alpha / num_classes), (chunk, num_domains))  # (chunk, R, K)
        conditions = np.linalg.cond(drawn)
        good = np.flatnonzero(conditions <= max_condition)
        if len(good):
            priors = torch.from_numpy(drawn[good[0]]).T
            return priors / priors.sum(dim=0)
        best = min(best, float(conditions.min()))
    raise UserError(
        f"LabelShiftData: no p(y|d) of {tries} draws has a condition number of at most max_condition={max_condition}; "
        f"the best is {best:.2f}. Allow more, take more domains than {num_domains}, or a smaller alpha than {alpha}"
    )


def divide(labels: Tensor, class_given_domain: Tensor, stream: torch.Generator) -> list[Tensor]:
    """Sorted positions of R disjoint domains of one size, the largest that these class frequencies allow.

    Numbers of samples are those of the largest remainders, so that a domain is off by less than one sample a class.

    Args:
        labels: (N,); -1 is never taken.
        class_given_domain: p(y|d), (K, R).
        stream: decides which samples.

    Raises:
        UserError: when the classes are too small for one sample a domain.
    """
    num_classes, num_domains = class_given_domain.shape
    available = counts(labels, num_classes, "LabelShiftData")
    size = int((available / class_given_domain.sum(dim=1).clamp_min(1e-12)).min()) + 1
    table = torch.zeros(num_classes, num_domains, dtype=torch.long)
    while size > 0:
        exact = class_given_domain * size
        table = exact.floor().long()
        order = (table - exact).argsort(dim=0, stable=True).argsort(dim=0)  # place of each class by its remainder
        table += order < size - table.sum(dim=0)
        if bool((table.sum(dim=1) <= available).all()):
            break
        size -= 1
    else:
        raise UserError("LabelShiftData: the source has too few samples of a class for these domains")
    shuffled = torch.randperm(len(labels), generator=stream)
    members = [shuffled[labels[shuffled] == label].split([*row.tolist(), int(available[label] - row.sum())])
               for label, row in enumerate(table)]  # fmt: skip
    return [torch.cat([of_class[domain] for of_class in members]).sort().values for domain in range(num_domains)]
