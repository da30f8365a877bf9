import itertools

import pytest
import torch

from zoo.core.errors import UserError
from zoo.losses import (
    coral,
    cross_domain_partners,
    domain_means,
    domain_rows,
    mean_over_domains,
    mean_squared_difference,
    mmd,
    pairwise_coral,
    pairwise_mmd,
)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(14, 5, dtype=torch.float64, generator=GENERATOR) * 0.7
DOMAIN = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 2, 0, 1, 2, 2])
SHIFTED = X + DOMAIN.unsqueeze(1)


def parts() -> list[torch.Tensor]:
    return [torch.stack([x for x, d in zip(SHIFTED, DOMAIN, strict=True) if d == s]) for s in range(3)]


def test_means_are_those_of_a_loop_and_an_absent_domain_is_zero_without_nan() -> None:
    x = SHIFTED.clone().requires_grad_()
    means, counts = domain_means(x, DOMAIN, 4)
    assert counts.tolist() == [4, 4, 6, 0]
    for s, part in enumerate(parts()):
        assert torch.allclose(means[s], part.mean(0))
    assert not means[3].any()
    (means**2).sum().backward()
    assert torch.isfinite(x.grad).all()
    scalar, _ = domain_means(SHIFTED[:, 0], DOMAIN, 3)
    assert scalar.shape == (3,)
    # a domain that is none counts nowhere
    assert domain_means(SHIFTED, DOMAIN - 1, 3)[1].tolist() == [4, 6, 0]
    assert domain_means(X.half(), DOMAIN, 3)[0].dtype == torch.float32
    maps, _ = domain_means(SHIFTED.view(14, 5, 1), DOMAIN, 3)
    assert maps.shape == (3, 5, 1)


def test_mean_over_domains_counts_them_alike() -> None:
    values, counts = torch.tensor([1.0, 3.0, 100.0]), torch.tensor([1.0, 9.0, 0.0])
    assert mean_over_domains(values, counts).item() == 2.0
    assert mean_over_domains(values, counts * 0).item() == 0.0


def test_squared_difference_of_all_pairs() -> None:
    values = torch.randn(4, 3, 2, dtype=torch.float64, generator=GENERATOR)
    counts = torch.tensor([1.0, 2.0, 0.0, 3.0])
    pairs = [(values[i] - values[j]).square().mean() for i, j in itertools.combinations((0, 1, 3), 2)]
    assert mean_squared_difference(values, counts).item() == pytest.approx(float(sum(pairs)) / 3, abs=1e-12)
    assert mean_squared_difference(values[:1], counts[:1]).item() == 0.0


@pytest.mark.parametrize("num_domains", [3, 5])
def test_pairwise_distances_are_those_of_each_pair_with_their_gradients(num_domains) -> None:
    gammas = (0.001, 0.01, 0.1, 1.0, 10.0)
    pairs = list(itertools.combinations(range(3), 2))
    for ours, theirs in (
        (lambda x: pairwise_coral(x, DOMAIN, num_domains), lambda a, b: coral(a, b, "moments")),
        (lambda x: pairwise_coral(x, DOMAIN, num_domains, means=False), lambda a, b: coral(a, b)),
        (
            lambda x: pairwise_mmd(x, DOMAIN, num_domains, gammas),
            lambda a, b: mmd(a, b, [1 / (2 * g) for g in gammas], 1.0, "biased"),
        ),
    ):
        x, y = SHIFTED.clone().requires_grad_(), SHIFTED.clone().requires_grad_()
        value = ours(x)
        split = [y[s == DOMAIN] for s in range(3)]
        wanted = sum(theirs(split[i], split[j]) for i, j in pairs) / 3
        assert value.item() == pytest.approx(wanted.item(), rel=1e-10)
        assert value.item() > 1e-3
        value.backward()
        wanted.backward()
        assert torch.allclose(x.grad, y.grad, atol=1e-12)


def test_kernel_means_by_explicit_loops() -> None:
    gammas, total = (0.3, 2.0), 0.0

    def kernel(a, b):
        return sum(torch.exp(-g * (a - b).square().sum()) for g in gammas)

    for a, b in itertools.combinations(parts(), 2):
        total += sum(kernel(x, y) for x in a for y in a) / len(a) ** 2
        total += sum(kernel(x, y) for x in b for y in b) / len(b) ** 2
        total -= 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    assert pairwise_mmd(SHIFTED, DOMAIN, 3, gammas).item() == pytest.approx(float(total) / 3, rel=1e-10)


def test_equal_or_single_domains_are_not_apart() -> None:
    twice, domain = torch.cat([X, X]), torch.arange(2).repeat_interleave(14)
    for distance in (pairwise_coral, pairwise_mmd):
        assert distance(twice, domain, 2).item() == pytest.approx(0, abs=1e-12)
        assert distance(X, torch.zeros(14), 1).item() == pytest.approx(0, abs=1e-12)
        x = X.clone().requires_grad_()
        distance(x, torch.zeros(14), 4).backward()
        assert torch.isfinite(x.grad).all()
        assert distance(X.float().bfloat16(), DOMAIN, 3).dtype == torch.float32


def test_order_of_the_samples_does_not_matter() -> None:
    shuffle = torch.randperm(14, generator=GENERATOR)
    for distance in (pairwise_coral, pairwise_mmd):
        ours = distance(SHIFTED, DOMAIN, 3)
        assert torch.allclose(distance(SHIFTED[shuffle], DOMAIN[shuffle], 3), ours)
        relabeled = torch.tensor([1, 2, 0])[DOMAIN]
        assert torch.allclose(distance(SHIFTED, relabeled, 3), ours)


def test_rows_and_partners() -> None:
    domain = torch.tensor([1, 0, 2, 2, 1, 0])
    assert domain_rows(domain, 3).tolist() == [[1, 5], [0, 4], [2, 3]]
    partners, places = cross_domain_partners(domain, 3, torch.tensor([2, 0, 1]))  # 2 -> 0 -> 1 -> 2
    assert domain[partners].tolist() == [2, 1, 0, 0, 2, 1]
    assert sorted(partners.tolist()) == list(range(6))
    assert places.tolist() == [2, 1, 0, 0, 2, 1]
    partners, _ = cross_domain_partners(torch.zeros(4, dtype=torch.int64), 1, torch.tensor([0]))
    assert sorted(partners.tolist()) == list(range(4))
    with pytest.raises(UserError, match="batch of 6 has not as many samples of each of 4"):
        cross_domain_partners(domain, 4, torch.arange(4))
