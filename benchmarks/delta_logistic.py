"""Delta learning in logistic regression: ``python -m benchmarks.delta_logistic``. A few seconds.

A student, a weak and a weaker teacher are unit vectors at given cosines to the truth; labels are signs, inputs
Gaussian, so that the accuracy of a direction at the angle a is 1 - a / π. What they do not share with the truth is
error, and the errors of the three are correlated by ρ. The student learns from the pairs (weak teacher's label, weaker
teacher's label), or imitates the weak teacher; for each ρ the best accuracy on the way and the last one are printed,
and what the best would be along the straight line of the first step, in closed form.

What it shows: pairs cancel an error that is shared, imitation does not. With independent errors, imitation that is
stopped at the right time is better than pairs.

Source: Geng et al. 2025, arXiv 2507.06187, whose theorem is on this model; the correlation as a knob is ours.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus


def accuracy_of(cosine: Tensor) -> Tensor:
    """Share of Gaussian inputs on which a direction agrees with the truth."""
    return 1 - cosine.clamp(-1, 1).arccos() / math.pi


def models(cosines: Tensor, correlations: Tensor, dimension: int, stream: torch.Generator) -> Tensor:
    r"""Unit vectors (R, 3, D) with these cosines (3,) to the first axis and these correlations (R,) of their errors.

    Errors are :math:`\sqrt\rho\, u + \sqrt{1 - \rho} v_i` with orthonormal u and v.
    """
    frame = torch.linalg.qr(torch.randn(dimension - 1, 4, generator=stream, dtype=torch.double)).Q.T
    rho = correlations.view(-1, 1, 1)
    errors = rho.sqrt() * frame[0] + (1 - rho).sqrt() * frame[1:]
    truth = cosines.view(1, -1, 1).expand(len(rho), -1, 1)
    return torch.cat([truth, (1 - truth.square()).sqrt() * errors], dim=2)


def best_on_line(start: Tensor, direction: Tensor) -> Tensor:
    r"""Best accuracy of ``start`` (R, D) plus a non-negative multiple of ``direction`` (R, D).

    The cosine to the truth e is largest where :math:`\langle e, d \rangle \langle s, s + t d \rangle
    = \langle e, s \rangle \langle d, s + t d \rangle`.
    """
    s, d = start[:, 0], direction[:, 0]
    ss, sd, dd = (start * start).sum(1), (start * direction).sum(1), (direction * direction).sum(1)
    t = (d * ss - s * sd) / (s * dd - d * sd)
    t = torch.where((t > 0) & t.isfinite(), t, torch.zeros_like(t))
    ends = torch.stack([start, start + t.unsqueeze(1) * direction, direction])
    return accuracy_of(normalize(ends, dim=-1)[..., 0]).amax(0)


def train(
    start: Tensor, inputs: Tensor, chosen: Tensor, rejected: Tensor | None, steps: int, rate: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Best and last accuracy (R,) of full-batch gradient descent, on pairs, or on the chosen labels alone.

    Args:
        start: (R, D), the reference.
        inputs: (N, D).
        chosen: labels ±1 (R, N).
        rejected: likewise; None imitates.
        steps: of gradient descent.
        rate: its learning rate.
        beta: β of DPO.
    """
    weights = start.clone().requires_grad_()
    accuracies = [accuracy_of(normalize(start, dim=1)[:, 0])]
    reference = start @ inputs.T
    for _ in range(steps):
        scores = weights @ inputs.T
        if rejected is None:
            losses = softplus(-chosen * scores)
        else:  # log π(y) - log π(-y) = y θx, so that pairs of equal labels teach nothing
            losses = softplus(-beta * (chosen - rejected) / 2 * (scores - reference)) * (chosen != rejected)
        (gradient,) = torch.autograd.grad(losses.mean(1).sum(), weights)
        weights = (weights - rate * gradient).detach().requires_grad_()
        accuracies.append(accuracy_of(normalize(weights.detach(), dim=1)[:, 0]))
    path = torch.stack(accuracies)
    return path.amax(0), path[-1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--student", type=float, default=0.75, help="cosine to the truth")
    parser.add_argument("--weak", type=float, default=0.6)
    parser.add_argument("--weaker", type=float, default=0.3)
    parser.add_argument("--correlations", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 0.9, 0.99])
    parser.add_argument("--dimension", type=int, default=20)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rho = torch.tensor(options.correlations, dtype=torch.double)
    cosines = torch.tensor([options.student, options.weak, options.weaker], dtype=torch.double)
    results: list[Tensor] = []
    for seed in range(options.seeds):
        stream = torch.Generator().manual_seed(seed)
        student, weak, weaker = models(cosines, rho, options.dimension, stream).unbind(1)
        inputs = torch.randn(options.samples, options.dimension, generator=stream, dtype=torch.double)
        chosen, rejected = (torch.where(teacher @ inputs.T > 0, 1.0, -1.0).double() for teacher in (weak, weaker))
        length = [options.steps, options.rate, options.beta]
        delta, imitation = (train(student, inputs, chosen, other, *length) for other in (rejected, None))  # type: ignore[arg-type]
        lines = best_on_line(student, weak - weaker), best_on_line(student, weak)
        results.append(torch.stack([*delta, lines[0], *imitation, lines[1]]))
    rows = torch.stack(results)
    start = accuracy_of(cosines)
    print(f"student {start[0]:.3f}, weak teacher {start[1]:.3f}, weaker teacher {start[2]:.3f}; {options.seeds} seeds")
    print("          pairs                      imitation")
    print("    ρ     best         last   line   best         last   line")
    for n, value in enumerate(options.correlations):
        cells = []
        for first in (0, 3):
            best, last, line = rows[:, first : first + 3, n].mean(0).tolist()
            cells.append(f"{best:.3f} ± {rows[:, first, n].std(correction=0):.3f}  {last:.3f}  {line:.3f}")
        print(f"{value:6.2f}  {'  '.join(cells)}")


if __name__ == "__main__":
    main()
