import math

import pytest
import torch
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.core import validators
from zoo.core.errors import UserError
from zoo.core.validators import (
    BatchNuclearNorm,
    InformationMaximization,
    NegativeEntropy,
    a_distance,
    deep_embedded_validation,
    density_ratio,
    soft_neighborhood_density,
)

CLASSES = 5


def logits(count: int = 83, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(count, CLASSES, generator=generator, dtype=torch.float64)


def metrics() -> list:
    return [NegativeEntropy(), InformationMaximization(CLASSES), BatchNuclearNorm(CLASSES)]


def values(rows: torch.Tensor, batch: int = 7) -> list[float]:
    found = []
    for metric in metrics():
        for part in rows.split(batch):
            metric.update(part)
        found.append(float(metric.compute()))
    return found


def brute_force(rows: torch.Tensor) -> list[float]:
    """Sample by sample, class by class."""
    p = rows.softmax(dim=1)
    mean_entropy = sum(-sum(x * math.log(x) for x in row) for row in p.tolist()) / len(p)
    mean = [sum(column) / len(p) for column in p.T.tolist()]
    diversity = -sum(x * math.log(x) for x in mean)
    norm = float(torch.linalg.matrix_norm(p, "nuc")) / math.sqrt(len(p) * min(p.shape))
    return [-mean_entropy, diversity - mean_entropy, norm]


@pytest.mark.parametrize("count", [83, 3])  # more and fewer samples than classes
def test_streams_equal_loops_over_all_samples(count) -> None:
    rows = logits(count)
    assert values(rows) == pytest.approx(brute_force(rows), abs=1e-12)
    assert values(rows, batch=1) == pytest.approx(values(rows, batch=count), abs=1e-12)
    assert values(rows.flip(0)) == pytest.approx(values(rows), abs=1e-12)  # order says nothing
    assert values(rows[:, [3, 0, 4, 1, 2]]) == pytest.approx(values(rows), abs=1e-12)  # nor do names of classes


def test_predictions_of_fewer_bits_are_summed_in_64() -> None:
    rows = logits().float()
    assert values(rows) == pytest.approx(brute_force(rows.double()), abs=1e-12)
    assert values(rows.bfloat16()) == pytest.approx(brute_force(rows.bfloat16().double()), abs=1e-12)


def test_limits() -> None:
    uniform = torch.zeros(40, CLASSES)
    assert values(uniform) == pytest.approx([-math.log(CLASSES), 0, 1 / CLASSES], abs=1e-12)
    certain = 1000 * torch.eye(CLASSES).repeat(8, 1)
    assert values(certain) == pytest.approx([0, math.log(CLASSES), 1], abs=1e-12)
    collapsed = certain[:1].repeat(40, 1)  # everything is of one class: the entropy alone is content
    assert values(collapsed) == pytest.approx([0, 0, 1 / math.sqrt(CLASSES)], abs=1e-12)


def test_density_equals_a_loop_and_does_not_depend_on_the_block() -> None:
    x = logits(37).softmax(dim=1)
    unit = x / x.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(len(x)):
        weights = [math.exp(float(unit[i] @ unit[j]) / 0.05) for j in range(len(x)) if j != i]
        total -= sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)
    wanted = total / len(x)
    for block in (1, 10, 37, 1000):
        assert float(soft_neighborhood_density(x, block=block)) == pytest.approx(wanted, abs=1e-12)
    assert float(soft_neighborhood_density(3 * x.flip(0))) == pytest.approx(wanted, abs=1e-12)
    assert float(soft_neighborhood_density(x, temperature=1e9)) == pytest.approx(math.log(36), abs=1e-9)


def test_density_of_points_and_pairs() -> None:
    assert float(soft_neighborhood_density(torch.ones(9, 3, dtype=torch.float64))) == pytest.approx(math.log(8))
    assert float(soft_neighborhood_density(torch.ones(1, 3))) == 0
    # two far groups of m: every sample has m - 1 equal neighbours
    groups = torch.eye(2, dtype=torch.float64).repeat_interleave(6, dim=0)
    assert float(soft_neighborhood_density(groups, temperature=1e-3)) == pytest.approx(math.log(5), abs=1e-9)
    # alone among orthogonal ones, neighbours are as near as can be: every other sample
    assert float(soft_neighborhood_density(torch.eye(4).double(), temperature=1e-3)) == pytest.approx(math.log(3))


def test_control_variate_by_hand() -> None:
    weights, losses = torch.tensor([0.5, 2.0, 1.0]).double(), torch.tensor([1.0, 0.0, 1.0]).double()
    # wl = (.5, 0, 1), means .5 and 7/6; cov = ((-2/3)(0) + (5/6)(-.5) + (-1/6)(.5)) / 2 = -.25
    # var = (4/9 + 25/36 + 1/36) / 2 = 7/12; η = 3/7; .5 + 3/7 · 1/6
    assert float(deep_embedded_validation(weights, losses)) == pytest.approx(0.5 + 1 / 14)
    joined = torch.stack([weights * losses, weights])
    eta = -joined.cov()[0, 1] / weights.var()
    assert float(-eta) == pytest.approx(-3 / 7)
    generator = torch.Generator().manual_seed(1)
    anything = torch.rand(50, generator=generator, dtype=torch.float64) * 3
    assert float(deep_embedded_validation(anything, torch.full((50,), 0.3).double())) == pytest.approx(0.3)
    assert float(deep_embedded_validation(torch.full((4,), 2.0), torch.tensor([0.0, 1, 0, 0]))) == 0.5
    assert float(deep_embedded_validation(torch.zeros(4), torch.ones(4))) == 0


def test_density_ratio_of_two_gaussians() -> None:
    """Shifted by δ with equal variances, log w(x) = δx - δ²/2."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(20_000, 1, generator=generator)
    target = torch.randn(5_000, 1, generator=generator) + 0.8
    at = torch.tensor([[-1.0], [0.0], [0.4], [1.0], [2.0]])
    wanted = (0.8 * at[:, 0] - 0.32).exp().tolist()
    assert density_ratio(source, target, at).tolist() == pytest.approx(wanted, rel=0.12)
    # the risk of a loss that is 1 above 1 is the target's share there, not the source's
    held = torch.randn(20_000, 1, generator=generator)
    risk = float(deep_embedded_validation(density_ratio(source, target, held), (held[:, 0] > 1).double()))
    assert risk == pytest.approx(1 - 0.5793, abs=0.02)  # P(N(.8, 1) > 1); of the source it would be .1587
    apart = density_ratio(source[:50], source[:50] + 100, source[50:99] + 1000)
    assert bool(apart.isfinite().all())
    assert bool((density_ratio(source[:50], source[:50] + 100, source[50:99]) < 0.1).all())


def test_distance_of_equal_and_of_separable_domains() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 400, 5, generator=generator).unbind()
    assert a_distance(x, y) < 0.15
    assert a_distance(x, x) < 0.15
    assert a_distance(x, y + 20) == 2
    assert a_distance(x, y + 20) == a_distance(y + 20, x)
    near = a_distance(x, y + torch.tensor([1.0, 0, 0, 0, 0]))
    assert near == pytest.approx(2 * (2 * 0.6915 - 1), abs=0.15)  # the best error of a shift by 1 is Φ(-1/2)
    assert a_distance(1000 * x, 1000 * y + torch.tensor([1000.0, 0, 0, 0, 0])) == pytest.approx(near, abs=1e-9)
    assert a_distance(x, y[:60]) < 0.5  # a rare domain is not found by guessing the frequent one
    assert a_distance(x, y + 1) == a_distance(x, y + 1)
    with pytest.raises(UserError, match="at least 4 samples of each domain, not 400 and 3"):
        a_distance(x, y[:3])


def _rank(rank: int, file: str, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    rows, found = logits()[rank::2], []
    for metric in metrics():
        for part in rows.split(9 - rank):
            metric.update(part)
        found.append(float(metric.compute()))
    queue.put(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_say_what_one_says(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [queue.get() for _ in ranks]
    for process in ranks:
        process.join()
    assert found[0] == found[1] == pytest.approx(values(logits()), abs=1e-12)


class Meter(TorchDispatchMode):
    """How many numbers are made, altogether and at most in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.total += tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize("number", range(3))
def test_work_is_linear_and_memory_does_not_grow(number) -> None:
    work, largest, states = [], [], []
    for count in (80, 160, 320):
        metric, rows = metrics()[number], logits(count)
        with Meter() as meter:
            for part in rows.split(8):
                metric.update(part)
        work.append(meter.total - count * CLASSES)
        largest.append(meter.largest)
        states.append(sum(getattr(metric, name).numel() for name in metric._defaults))
        assert metric._update_count == count // 8
    assert work[2] - work[1] == 2 * (work[1] - work[0]) > 0
    assert len(set(largest)) == len(set(states)) == 1
    assert states[0] <= 1 + CLASSES**2


def test_density_holds_a_block_of_rows_at_a_time() -> None:
    vectors = logits(256).softmax(1)
    largest = []
    for block in (16, 32):
        with Meter() as meter:
            soft_neighborhood_density(vectors, block=block)
        largest.append(meter.largest)
    assert largest == [max(16 * 256, vectors.numel()), 32 * 256]


def test_distance_reads_every_sample_twice(monkeypatch) -> None:
    from sklearn.base import BaseEstimator

    seen = {"fit": 0, "score": 0}

    class Counting(BaseEstimator):
        def fit(self, x, y):
            seen["fit"] += len(x)
            return self

        def score(self, x, y) -> float:
            seen["score"] += len(x)
            return 1.0

    monkeypatch.setattr(validators, "domain_classifier", Counting)
    for count in (20, 40):
        seen.update(fit=0, score=0)
        assert a_distance(torch.randn(count, 3), torch.randn(2 * count, 3)) == 2.0
        assert seen == {"fit": 2 * count, "score": 2 * count}  # both domains as the smaller one
