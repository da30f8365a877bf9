import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.core.heads import (
    MLP,
    Cosine,
    EquiangularBasis,
    Head,
    Linear,
    NaiveBayes,
    Prototypes,
    WeightNorm,
    equiangular,
    hadamard,
    orthonormal,
    simplex,
    spread,
    welch_bound,
)

HEADS = [Linear, Cosine, MLP, EquiangularBasis, NaiveBayes, Prototypes, WeightNorm]


@pytest.mark.parametrize("head", HEADS)
def test_shapes_and_base_class(head):
    built = head(6, 4)
    assert isinstance(built, Head)
    assert built(torch.randn(3, 6)).shape == (3, 4)


@pytest.mark.parametrize("head", [Linear, Cosine, MLP, Prototypes, WeightNorm])
def test_every_parameter_learns(head):
    torch.manual_seed(0)
    built = head(6, 4)
    F.cross_entropy(built(torch.randn(5, 6)), torch.arange(5) % 4).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in built.parameters())


@pytest.mark.parametrize("head", [EquiangularBasis, NaiveBayes])
def test_fixed_heads_have_no_parameters_but_are_saved(head):
    built = head(6, 4)
    assert not list(built.parameters())
    assert built.state_dict()


def test_linear_is_torchs():
    torch.manual_seed(0)
    ours = Linear(3, 2)
    torch.manual_seed(0)
    theirs = nn.Linear(3, 2)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(4, 3)
    assert torch.equal(ours(x), theirs(x))
    assert Linear(3, 2, bias=False).bias is None


def test_cosine_by_hand():
    head = Cosine(2, 2, scale=10.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    logits = head(torch.tensor([[0.0, 5.0]]))
    torch.testing.assert_close(logits, torch.tensor([[0.0, 10 / math.sqrt(2)]]))


def test_mlp_by_hand():
    head = MLP(2, 1, hidden=2)
    with torch.no_grad():
        head.hidden.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        head.hidden.bias.zero_()
        head.output.weight.copy_(torch.tensor([[2.0, 3.0]]))
        head.output.bias.fill_(0.5)
    assert head(torch.tensor([[1.0, -4.0]])).item() == 2.5


@pytest.mark.parametrize(("count", "dimension"), [(2, 1), (3, 2), (4, 3), (4, 10), (10, 128)])
def test_simplex_angles(count, dimension):
    vectors = simplex(count, dimension).double()
    expected = torch.full((count, count), -1 / (count - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(vectors @ vectors.T, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(vectors.sum(0), torch.zeros(dimension, dtype=torch.float64), atol=1e-6, rtol=0)


def test_simplex_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="num_vectors=4"):
        simplex(4, 2)


def test_equiangular_basis_is_reproducible_and_saved():
    first, second, other = EquiangularBasis(8, 5), EquiangularBasis(8, 5), EquiangularBasis(8, 5, seed=1)
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.allclose(first.vectors, other.vectors)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    EquiangularBasis(8, 5)
    assert torch.equal(before, torch.random.get_rng_state())
    logits = first(3 * first.vectors)
    torch.testing.assert_close(logits.diagonal(), torch.full((5,), 1 / 0.07))
    torch.testing.assert_close(logits, torch.eye(5) / 0.07, atol=1e-5, rtol=0)
    simplex_logits = EquiangularBasis(8, 5, kind="etf")
    assert simplex_logits(3 * simplex_logits.vectors)[0, 1].item() == pytest.approx(-0.25 / 0.07)


@pytest.mark.parametrize(("count", "dimension", "near"), [(40, 16, 1.2), (100, 50, 1.15)])
def test_many_directions_are_spread(count, dimension, near):
    vectors = spread(count, dimension)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(count))
    largest = (vectors @ vectors.T).fill_diagonal_(0).abs().max().item()
    bound = math.sqrt((count - dimension) / (dimension * (count - 1)))  # Welch: no set of so many lines does better
    assert welch_bound(count, dimension) == pytest.approx(bound)
    assert bound < largest < near * bound


def test_welch_bounds_of_the_paper():
    # 100 in 50 and 1000 in 100 dimensions
    assert welch_bound(100, 50) == pytest.approx(0.1005, abs=5e-5)
    assert welch_bound(1000, 100) == pytest.approx(0.0949, abs=5e-5)
    assert welch_bound(50, 50) == 0.0


@pytest.mark.parametrize(("count", "dimension"), [(2, 2), (5, 8), (10, 10), (11, 10), (10, 128)])
def test_where_the_bound_can_be_reached_it_is_reached_exactly(count, dimension):
    vectors = equiangular(count, dimension).double()
    cosines = (vectors @ vectors.T).fill_diagonal_(0).abs()
    assert cosines.max().item() == pytest.approx(welch_bound(count, dimension), abs=1e-6)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(count, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("count", "dimension"), [(8, 8), (5, 8), (4, 7), (2, 3)])
def test_hadamard_rows(count, dimension):
    vectors = hadamard(count, dimension)
    assert vectors.shape == (count, dimension)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(count))
    assert len(vectors[vectors != 0].abs().unique()) == 1


@pytest.mark.parametrize("kind", ["ebv", "etf", "hadamard", "random"])
def test_kinds_of_fixed_directions(kind):
    head = EquiangularBasis(8, 5, kind=kind)
    torch.testing.assert_close(head.vectors.norm(dim=1), torch.ones(5))
    assert torch.equal(head.vectors, EquiangularBasis(8, 5, kind=kind).vectors)
    features = torch.randn(20, 8, requires_grad=True)
    logits = head(features)
    assert logits.abs().max() <= 1 / 0.07 + 1e-4
    F.cross_entropy(logits, torch.arange(20) % 5).backward()
    assert features.grad.abs().sum() > 0


def test_only_angles_between_features_and_directions_count():
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    head, features = EquiangularBasis(8, 5), torch.randn(6, 8)
    logits = head(features)
    head.vectors = head.vectors @ turn
    torch.testing.assert_close(head(5 * features @ turn), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: orthonormal(4, 3), "orthonormal: num_vectors=4"),
        (lambda: hadamard(5, 7), "hadamard: num_vectors=5, must be at most 4"),
        (lambda: EquiangularBasis(3, 5, kind="etf"), "simplex: num_vectors=5"),
        (lambda: EquiangularBasis(3, 5, kind="grassmann"), "kind='grassmann'"),
    ],
)
def test_what_does_not_fit_is_said(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_equiangular_basis_on_the_meta_device():
    with torch.device("meta"):
        head = EquiangularBasis(8, 5)
    head.to_empty(device="cpu")
    head.reset_parameters()
    assert torch.equal(head.vectors, EquiangularBasis(8, 5).vectors)


def test_naive_bayes_is_the_posterior():
    torch.manual_seed(0)
    features = torch.randn(60, 3, dtype=torch.float64) * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    labels = torch.cat([torch.zeros(30), torch.ones(20), torch.full((10,), 2)]).long()
    features = features + labels.unsqueeze(1) * torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    head = NaiveBayes(3, 3, smoothing=0.0).double()
    head.fit(features, labels)
    means = torch.stack([features[labels == c].mean(0) for c in range(3)])
    variance = torch.stack([(features[i] - means[labels[i]]) ** 2 for i in range(60)]).mean(0)
    prior = torch.tensor([0.5, 1 / 3, 1 / 6], dtype=torch.float64)
    queries = torch.randn(5, 3, dtype=torch.float64)
    density = torch.distributions.Normal(means, variance.sqrt()).log_prob(queries.unsqueeze(1)).sum(-1)
    joint = density.exp() * prior
    torch.testing.assert_close(head(queries).softmax(1), joint / joint.sum(1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_naive_bayes_is_linear_and_uniform_before_the_first_fit():
    head = NaiveBayes(3, 4)
    torch.testing.assert_close(head(torch.randn(2, 3)).softmax(1), torch.full((2, 4), 0.25))
    head.fit(torch.randn(40, 3), torch.arange(40) % 4)
    a, b = torch.randn(2, 1, 3)
    torch.testing.assert_close(head((a + b) / 2), (head(a) + head(b)) / 2)


def test_naive_bayes_survives_a_constant_feature():
    features = torch.randn(20, 3)
    features[:, 1] = 2.0
    head = NaiveBayes(3, 2)
    head.fit(features, torch.arange(20) % 2)
    assert head(features).isfinite().all()


def test_prototypes_by_hand():
    head = Prototypes(2, 2, scale=0.5)
    head.fit(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0, 1]))
    assert torch.equal(head.prototypes, torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(head(torch.tensor([[1.0, 2.0]])), torch.tensor([[-2.0, -2.5]]))


@pytest.mark.parametrize("head", [NaiveBayes, Prototypes])
def test_fit_names_what_is_wrong(head):
    with pytest.raises(ValueError, match=r"classes \[1, 3\] have no sample"):
        head(2, 4).fit(torch.zeros(3, 2), torch.tensor([0, 2, 2]))
    with pytest.raises(ValueError, match="label 2"):
        head(2, 2).fit(torch.zeros(3, 2), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cosine(2, 2, scale=0), "scale=0"),
        (lambda: Prototypes(2, 2, scale=-1), "scale=-1"),
        (lambda: EquiangularBasis(2, 2, temperature=0), "temperature=0"),
        (lambda: EquiangularBasis(2, 1), "num_outputs=1"),
        (lambda: NaiveBayes(2, 2, smoothing=-1), "smoothing=-1"),
        (lambda: MLP(2, 2, hidden=0), "hidden=0"),
    ],
)
def test_bad_numbers_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_equiangular_basis_is_that_of_the_release():
    golden = json.loads((Path(__file__).parents[1] / "golden" / "equiangular_basis.json").read_text())
    given, wanted = golden["inputs"], golden["outputs"]
    head, features = EquiangularBasis(6, 4), torch.tensor(given["features"], requires_grad=True)
    head.vectors = torch.tensor(given["directions"])
    logits = head(features)
    torch.testing.assert_close(logits, torch.tensor(wanted["logits"]), rtol=1e-5, atol=1e-5)
    loss = F.cross_entropy(logits, torch.tensor(given["labels"]))
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-5)
    gradient = torch.autograd.grad(loss, features)[0]
    torch.testing.assert_close(gradient, torch.tensor(wanted["gradient"]), rtol=1e-4, atol=1e-5)
    cosines = (vectors := EquiangularBasis(100, 1000).vectors) @ vectors.T
    assert cosines.fill_diagonal_(0).abs().max() < 1.05 * wanted["largest_cosine"]  # in 300 steps instead of 100,000
