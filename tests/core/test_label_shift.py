import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.core.errors import UserError
from zoo.core.label_shift import (
    MatchedAccuracy,
    adjust,
    class_frequencies,
    class_probabilities,
    cluster_frequencies,
    discretize,
    domain_given_class,
    domain_rank,
    factorize,
    match_classes,
    prior_error,
)


@pytest.fixture(scope="module")
def golden(request) -> dict:
    return json.loads((Path(request.config.rootpath) / "tests/golden/latent_label_shift.json").read_text())


def priors(classes: int = 4, domains: int = 6, seed: int = 0) -> torch.Tensor:
    drawn = torch.rand(classes, domains, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return drawn / drawn.sum(dim=0)


def posteriors(samples: int = 50, classes: int = 4, sharpness: float = 2.0) -> torch.Tensor:
    drawn = torch.randn(samples, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (sharpness * drawn).softmax(dim=1)


def test_exact_domain_probabilities_give_the_classes_back() -> None:
    prior, truth = priors(), posteriors()
    q = truth @ domain_given_class(prior).mT  # q(d|x) = Σ_y p(d|y) p(y|x)
    for clip in (True, False):
        torch.testing.assert_close(class_probabilities(q, prior, clip), truth, rtol=0, atol=1e-12)


def test_known_domains_are_the_rule_of_label_shift() -> None:
    """p(y|x, d) ∝ p(y|x) p_d(y) / p(y), with p(y) the mean over domains."""
    prior, truth = priors(), posteriors()
    domains = torch.arange(len(truth)) % prior.shape[1]
    ratio = (prior / prior.mean(dim=1, keepdim=True)).mT[domains]
    expected = truth * ratio / (truth * ratio).sum(dim=1, keepdim=True)
    torch.testing.assert_close(adjust(truth, prior, domains), expected, rtol=0, atol=1e-12)


def test_agrees_with_the_authors_code(golden) -> None:
    inputs, outputs = golden["inputs"], golden["outputs"]
    prior = torch.tensor(inputs["class_given_domain"], dtype=torch.float64)
    q = torch.tensor(inputs["domain_probabilities"], dtype=torch.float64)
    found = class_probabilities(q, prior, clip=False)
    torch.testing.assert_close(
        found, torch.tensor(outputs["class_probabilities"], dtype=torch.float64), atol=1e-9, rtol=0
    )
    # clipped, rows are normalised: the authors' differ from 1 by what pinv leaves, their adjusted ones do not
    adjusted = torch.tensor(outputs["adjusted"], dtype=torch.float64)
    domains = torch.tensor(inputs["domains"])
    for clip in (True, False):
        torch.testing.assert_close(
            adjust(class_probabilities(q, prior, clip), prior, domains), adjusted, atol=1e-9, rtol=0
        )
    confusion = torch.zeros(3, 3, dtype=torch.long)
    for f, t in zip(inputs["found"], inputs["true"], strict=True):
        confusion[f, t] += 1
    assert match_classes(confusion).tolist() == outputs["ordering"]


def test_what_is_negative_is_clipped_and_normalised() -> None:
    prior = torch.tensor([[0.8, 0.1], [0.2, 0.9]], dtype=torch.float64)
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # more certain than any class allows
    assert (class_probabilities(q, prior, clip=False) < 0).any()
    torch.testing.assert_close(class_probabilities(q, prior), torch.eye(2, dtype=torch.float64))


def test_nothing_left_is_no_nan() -> None:
    prior = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.5]])
    certain = torch.tensor([[1.0, 0.0, 0.0]])  # class 0, which domain 2 has not
    torch.testing.assert_close(adjust(certain, prior, torch.tensor([2])), torch.tensor([[0.0, 0.5, 0.5]]))
    assert torch.equal(class_probabilities(torch.ones(2, 3) / 3, torch.zeros(3, 3)), torch.full((2, 3), 1 / 3))


def test_factorization_finds_the_priors_where_every_class_has_a_cluster_of_its_own() -> None:
    prior = priors(3, 5)
    clusters = torch.tensor([[0.6, 0, 0], [0, 0.5, 0], [0, 0, 0.7], [0.4, 0.2, 0.1], [0, 0.3, 0.2]]).double()
    prior[0, 0] = prior[1, 1] = prior[2, 2] = prior[0, 3] = 0  # domains without a class: the factors are then unique
    prior = prior / prior.sum(dim=0)
    found = factorize(clusters @ prior, 3)
    assert found.error < 1e-4
    matching = (found.class_given_domain[:, None] - prior[None]).abs().sum(dim=2).argmin(dim=1)
    assert sorted(matching.tolist()) == [0, 1, 2]
    torch.testing.assert_close(found.class_given_domain, prior[matching], atol=5e-3, rtol=0)
    torch.testing.assert_close(found.cluster_given_class, clusters[:, matching], atol=5e-3, rtol=0)
    torch.testing.assert_close(found.class_given_domain.sum(dim=0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found.cluster_given_class.sum(dim=0), torch.ones(3, dtype=torch.float64))


def test_factors_explain_the_counts_of_the_golden_table_as_well_as_the_authors(golden) -> None:
    counts = torch.tensor(golden["inputs"]["counts"], dtype=torch.float64)
    frequencies = counts / counts.sum(dim=0)
    found = factorize(frequencies, 3)
    explained = found.cluster_given_class @ found.class_given_domain
    torch.testing.assert_close(explained, frequencies, atol=2e-3, rtol=0)


def test_a_restart_never_explains_less() -> None:
    frequencies = priors(8, 6, seed=3)
    errors = [factorize(frequencies, 4, restarts=n).error for n in (1, 4)]
    assert errors[1] <= errors[0]


def test_cluster_frequencies_count_every_domain_alike() -> None:
    clusters = torch.tensor([0, 0, 1, 1, 1, 2])
    domains = torch.tensor([0, 0, 0, 0, 1, 1])
    expected = torch.tensor([[0.5, 0.0], [0.5, 0.5], [0.0, 0.5]], dtype=torch.float64)
    assert torch.equal(cluster_frequencies(clusters, domains, 3, 2), expected)
    with pytest.raises(UserError, match="domain 2 of 3 has no sample"):
        cluster_frequencies(clusters, domains, 3, 3)


def test_rank_is_that_of_the_domains_whatever_the_noise_of_counting() -> None:
    stream = torch.Generator().manual_seed(0)
    samples = 2000

    def counted(frequencies: torch.Tensor) -> torch.Tensor:
        drawn = torch.multinomial(frequencies.mT, samples, replacement=True, generator=stream)  # (R, n)
        domains = torch.arange(frequencies.shape[1]).repeat_interleave(samples)
        return cluster_frequencies(drawn.flatten(), domains, frequencies.shape[0], frequencies.shape[1])

    eye = torch.eye(4, dtype=torch.float64)
    mixing = eye.repeat(2, 1) / 2  # every class has two clusters
    apart = torch.cat([0.6 * eye + 0.1, torch.full((4, 2), 0.25, dtype=torch.float64)], dim=1)
    different = mixing @ apart
    assert domain_rank(counted(different), samples) == 4
    equal = different[:, :1].expand(-1, 6)
    assert domain_rank(counted(equal), samples) == 1
    two = mixing @ apart[:, :2].repeat(1, 3)  # six domains, only two kinds of them
    assert domain_rank(counted(two), samples) == 2


def test_metrics_do_not_depend_on_the_order_of_the_classes() -> None:
    stream = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(200, 4, generator=stream), torch.randint(4, (200,), generator=stream)
    true, found = priors(), priors(seed=5)
    values = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        metric = MatchedAccuracy(4)
        for part in (slice(0, 70), slice(70, 200)):  # column i of the permuted scores is class order[i] of the others
            metric.update(scores[part][:, order], labels[part])
        values.append((float(metric.compute()), prior_error(found[order], true, metric.matching)))
    assert values[0] == pytest.approx(values[1])


def test_matched_accuracy_by_hand() -> None:
    metric = MatchedAccuracy(3)
    found, labels = torch.tensor([2, 2, 1, 0, 0, 1, 2]), torch.tensor([0, 0, 2, 1, 1, 1, -1])
    metric.update(F.one_hot(found, 3).float(), labels)
    assert float(metric.compute()) == pytest.approx(5 / 6)  # 2 → 0, 1 → 2, 0 → 1; one of class 1 was found as 1
    assert metric.matching.tolist() == [1, 2, 0]


def test_prior_error_by_hand() -> None:
    true = torch.tensor([[0.5, 1.0], [0.5, 0.0]])
    found = torch.tensor([[0.5, 0.2], [0.5, 0.8]])
    assert prior_error(found, true, torch.tensor([1, 0])) == pytest.approx(0.2)
    assert prior_error(found, true, torch.tensor([0, 1])) == pytest.approx(0.8)


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(UserError, match="clusters=9"):
        discretize(torch.rand(8, 2), 9)
    with pytest.raises(UserError, match="3 clusters and 2 domains"):
        factorize(torch.rand(3, 2), 3)


def test_finds_classes_that_the_features_do_not_show() -> None:
    """Every class is two blobs far apart, neighbours of other classes': clustering the input joins the wrong ones."""
    prior = priors(3, 6, seed=10)
    y = torch.multinomial(prior.mT, 300, replacement=True).flatten()
    domains = torch.arange(6).repeat_interleave(300)
    places = torch.tensor([[[0.0, 0.0], [6.0, 0.0]], [[1.8, 0.0], [3.0, 6.0]], [[7.8, 0.0], [4.8, 6.0]]])
    x = places[y, torch.randint(2, y.shape)] + 0.5 * torch.randn(len(y), 2)
    network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(network(x), domains).backward()
        optimizer.step()
    with torch.no_grad():
        q = network(x).double().softmax(dim=1)
    frequencies = cluster_frequencies(discretize(q, 8), domains, 8, 6)
    assert domain_rank(frequencies, 300) >= 3  # of samples that the network was trained on, perhaps one more
    found = factorize(frequencies, 3).class_given_domain
    metric, plain = MatchedAccuracy(3), MatchedAccuracy(3)
    metric.update(adjust(class_probabilities(q, found), found, domains), y)
    plain.update(F.one_hot(discretize(x, 3), 3).float(), y)
    assert float(metric.compute()) > max(0.85, float(plain.compute()) + 0.2)
    assert prior_error(found, prior, metric.matching) < 0.3


def test_class_frequencies_are_of_all_samples_and_the_rank_of_those_held_out() -> None:
    prior = priors(3, 4)
    y = torch.multinomial(prior.mT, 200, replacement=True, generator=torch.Generator().manual_seed(2)).flatten()
    domains = torch.arange(4).repeat_interleave(200)
    q = (prior / prior.sum(dim=1, keepdim=True))[y]  # a perfect discriminator
    found, rank = class_frequencies(q, domains, 3, 3)
    assert rank == 3
    assert prior_error(found, prior, match_classes(found @ prior.mT)) < 0.3
    alike = torch.zeros(800, dtype=torch.bool)
    alike[[int((domains == d).logical_and(y == k).nonzero()[0]) for d in range(4) for k in range(3)]] = True
    same, other = class_frequencies(q, domains, 3, 3, alike)  # one sample a class and domain: domains are all alike
    assert torch.equal(same, found)
    assert other < 3
