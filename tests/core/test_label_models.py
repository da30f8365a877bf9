import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.core.label_models import DawidSkene, LabelModel, MajorityVote, MatrixCompletion, TripletMoments, WeightedVote
from zoo.core.label_models.dawid_skene import expectation, vote_shares
from zoo.core.label_models.matrix_completion import completion_loss, in_order
from zoo.core.label_models.sums import PackedVotes, overlaps, scores
from zoo.core.label_models.triplets import from_covariances, from_products, triplets

ACCURACIES = [0.9, 0.8, 0.7, 0.65, 0.6]
LEARNING = [DawidSkene, MatrixCompletion, TripletMoments]
ALL = [*LEARNING, MajorityVote]


def plant(
    samples: int,
    accuracies: list[float],
    classes: int = 2,
    cover: float = 1.0,
    balance: list[float] | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Votes of functions that err independently, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.tensor(balance or [1 / classes] * classes)
    labels = torch.multinomial(frequencies, samples, replacement=True, generator=generator)
    shape = (samples, len(accuracies))
    right = torch.rand(shape, generator=generator) < torch.tensor(accuracies)
    others = (labels.unsqueeze(1) + torch.randint(1, classes, shape, generator=generator)) % classes
    votes = torch.where(right, labels.unsqueeze(1), others)
    return votes.masked_fill(torch.rand(shape, generator=generator) > cover, -1), labels


def right(model: LabelModel, votes: Tensor, labels: Tensor) -> float:
    return float((model.posterior(votes).argmax(1) == labels).float().mean())


# Sums -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "functions", "classes"), [(1, 1, 2), (50, 7, 2), (40, 5, 10), (300, 4, 300)])
def test_sums_equal_those_with_one_hot_matrices(samples, functions, classes, monkeypatch) -> None:
    monkeypatch.setattr("zoo.core.label_models.sums._CHUNK", 16)
    monkeypatch.setattr("zoo.core.label_models.sums._EXACT", 16)
    monkeypatch.setattr("zoo.core.label_models.sums._CACHED", 2 * (classes + 1))
    generator = torch.Generator().manual_seed(samples)
    votes = torch.randint(-1, classes, (samples, functions), generator=generator)
    table = torch.randn(functions, classes + 1, 3, generator=generator, dtype=torch.float64)
    values = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    one = (votes.unsqueeze(2) + 1 == torch.arange(classes + 1)).double()
    packed = PackedVotes(votes, classes)
    grouped = packed.packed(table)
    over_functions = torch.cat([chunk.over_functions(grouped) for chunk in packed])
    parts = zip(packed, values.split(16), strict=True)
    over_samples = packed.unpacked(torch.stack([chunk.over_samples(part) for chunk, part in parts]).sum(0))
    expected = torch.einsum("njl,jld->nd", one, table)
    torch.testing.assert_close(over_functions, expected)
    torch.testing.assert_close(scores(votes, table, chunk=16), expected)
    torch.testing.assert_close(over_samples, torch.einsum("njl,nd->jld", one, values))
    if classes < 300:
        joint = torch.einsum("njl,nkm->jlkm", one[:, :, 1:], one[:, :, 1:]) / samples
        torch.testing.assert_close(overlaps(votes, classes), joint, rtol=0, atol=1e-12)


def test_several_functions_share_a_code() -> None:
    votes = torch.zeros(2, 11, dtype=torch.long)
    assert [PackedVotes(votes, c).group for c in (2, 10, 300)] == [5, 2, 1]


# Counting -------------------------------------------------------------------------------------------------------------


def test_majority_leaves_ties_and_silence_to_the_prior() -> None:
    votes = torch.tensor([[0, 0, 1], [0, 1, -1], [1, 2, -1], [-1, -1, -1]])
    model = MajorityVote(3, balance=[0.2, 0.5, 0.3]).fit(votes)
    expected = [[1, 0, 0], [2 / 7, 5 / 7, 0], [0, 5 / 8, 3 / 8], [0.2, 0.5, 0.3]]
    torch.testing.assert_close(model.posterior(votes), torch.tensor(expected))
    shares = MajorityVote(3, soft=True, balance=[0.2, 0.5, 0.3]).fit(votes).posterior(votes)
    expected = [[2 / 3, 1 / 3, 0], [0.5, 0.5, 0], [0, 0.5, 0.5], [0.2, 0.5, 0.3]]
    torch.testing.assert_close(shares, torch.tensor(expected))
    assert model.accuracies.isnan().all()
    assert bool(model(votes).isfinite().all())


def test_weighted_vote_is_bayes_rule() -> None:
    votes = torch.tensor([[0, 1], [-1, 2], [-1, -1]])
    model = WeightedVote(3, [0.8, 0.6], balance=[0.5, 0.25, 0.25]).fit(votes)
    first = torch.tensor([0.5 * 0.8 * 0.2, 0.25 * 0.1 * 0.6, 0.25 * 0.1 * 0.2])
    second = torch.tensor([0.5 * 0.2, 0.25 * 0.2, 0.25 * 0.6])
    expected = torch.stack([first / first.sum(), second / second.sum(), torch.tensor([0.5, 0.25, 0.25])])
    torch.testing.assert_close(model.posterior(votes), expected)
    torch.testing.assert_close(model.accuracies, torch.tensor([0.8, 0.6]))
    silent = torch.cat([torch.full((3, 1), -1), votes], dim=1)  # whose accuracy is given, too
    with pytest.warns(UserWarning, match="always abstaining"):
        model = WeightedVote(3, [0.9, 0.8, 0.6], balance=[0.5, 0.25, 0.25]).fit(silent)
    torch.testing.assert_close(model.posterior(silent), expected)


def test_no_rule_is_better_than_log_odds() -> None:
    votes = torch.tensor(list(itertools.product((0, 1), repeat=5)))
    labels = torch.tensor([0, 1]).view(2, 1, 1)
    a = torch.tensor(ACCURACIES, dtype=torch.float64)
    likelihood = torch.where(votes == labels, a, 1 - a).prod(2)  # (label, pattern)
    best = float(likelihood.amax(0).sum() / 2)
    said = WeightedVote(2, ACCURACIES).fit(votes).posterior(votes).argmax(1)
    assert float(likelihood.gather(0, said.unsqueeze(0)).sum() / 2) == pytest.approx(best)
    counted = MajorityVote(2).fit(votes).posterior(votes).argmax(1)
    assert float(likelihood.gather(0, counted.unsqueeze(0)).sum() / 2) < best - 0.02


def test_accuracies_from_the_labelled_few() -> None:
    votes = torch.tensor([[0, 1], [1, 1], [1, -1]])
    few = torch.tensor([[0, 1], [1, 1], [1, -1], [0, 0]]), torch.tensor([0, 1, 1, -1])
    model = WeightedVote(2, balance="labeled").fit(votes, labeled=few)
    torch.testing.assert_close(model.accuracies, torch.tensor([4 / 5, 2 / 4]))  # (right + 1) / (votes + 2)
    torch.testing.assert_close(model.balance, torch.tensor([2 / 5, 3 / 5]))
    with pytest.raises(UserError, match="no labelled samples"):
        WeightedVote(2).fit(votes)
    with pytest.raises(UserError, match="there are no labelled samples"):
        WeightedVote(2, [0.7, 0.7], balance="labeled").fit(votes)


# Dawid-Skene ----------------------------------------------------------------------------------------------------------


def test_em_begins_with_shares_of_votes_and_the_balance_where_there_are_none() -> None:
    votes = torch.tensor([[0, 1], [1, -1], [-1, -1]])
    balance = torch.tensor([0.3, 0.7], dtype=torch.float64)
    shares = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.3, 0.7]], dtype=torch.float64)
    expected = torch.zeros(2, 3, 2, dtype=torch.float64)
    for i, j in itertools.product(range(3), range(2)):
        expected[j, votes[i, j] + 1] += shares[i]
    counts, totals = vote_shares(PackedVotes(votes, 2), balance)
    torch.testing.assert_close(counts, expected)
    torch.testing.assert_close(totals, shares.sum(dim=0))


@pytest.mark.parametrize("abstain", ["outcome", "ignore"])
@pytest.mark.parametrize("balance", ["estimated", "uniform"])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_no_step_of_em_lowers_the_objective(abstain, balance, smoothing) -> None:
    votes, _ = plant(300, [0.7, 0.5, 0.6, 0.4], classes=3, cover=0.6, balance=[0.6, 0.3, 0.1])
    packed = PackedVotes(votes, 3)
    model = DawidSkene(3, abstain=abstain, balance=balance, smoothing=smoothing)
    prior = torch.full((3,), 1 / 3, dtype=torch.float64)
    counts, totals = vote_shares(packed, prior)
    values = []
    for _ in range(40):
        table, found, penalty = model.maximize(counts, totals, None if balance == "estimated" else prior)
        counts, totals, likelihood = expectation(packed, table, found)
        values.append(float(likelihood + penalty))
    steps = torch.tensor(values).diff()
    assert bool((steps >= -1e-9).all())
    assert float(steps[:5].min()) > 1e-3


def test_fitting_keeps_its_objective_and_says_when_it_does_not_stand_still() -> None:
    votes, _ = plant(500, [0.7, 0.5, 0.6, 0.4], classes=3, cover=0.6)
    model = DawidSkene(3).fit(votes)
    assert 2 < len(model.objective) < 200
    assert min(b - a for a, b in itertools.pairwise(model.objective)) > -1e-6
    with pytest.warns(UserWarning, match="max_iterations=3 reached"):
        DawidSkene(3, max_iterations=3).fit(votes)


def test_expectation_by_hand() -> None:
    votes = torch.tensor([[0, -1], [1, 1]])
    rates = torch.tensor([[[0.1, 0.2], [0.6, 0.1], [0.3, 0.7]], [[0.5, 0.25], [0.25, 0.25], [0.25, 0.5]]]).double()
    balance = torch.tensor([0.4, 0.6]).double()
    counts, totals, likelihood = expectation(PackedVotes(votes, 2), rates.log(), balance)
    joint = torch.tensor([[0.4 * 0.6 * 0.5, 0.6 * 0.1 * 0.25], [0.4 * 0.3 * 0.25, 0.6 * 0.7 * 0.5]]).double()
    q = joint / joint.sum(1, keepdim=True)
    torch.testing.assert_close(totals, q.sum(0))
    assert float(likelihood) == pytest.approx(float(joint.sum(1).log().sum()))
    torch.testing.assert_close(counts[0, 1], q[0])
    torch.testing.assert_close(counts[1, 0], q[0])
    torch.testing.assert_close(counts[1, 2], q[1])
    torch.testing.assert_close(counts[0].sum(0), totals)


def test_two_perfect_functions_beat_a_random_one() -> None:
    votes, labels = plant(600, [1.0, 1.0, 0.25], classes=4)
    model = DawidSkene(4).fit(votes)
    assert right(model, votes, labels) == 1.0
    torch.testing.assert_close(model.accuracies, torch.tensor([1.0, 1.0, 0.25]), atol=0.05, rtol=0)


def test_dawid_skene_recovers_confusion_matrices_and_balance() -> None:
    balance = [0.5, 0.3, 0.2]
    votes, labels = plant(20_000, ACCURACIES, classes=3, balance=balance, cover=0.9)
    model = DawidSkene(3, smoothing=1e-3).fit(votes)
    torch.testing.assert_close(model.balance, torch.tensor(balance), atol=0.01, rtol=0)
    torch.testing.assert_close(model.accuracies, torch.tensor(ACCURACIES), atol=0.015, rtol=0)
    torch.testing.assert_close(model.table.exp().sum(1), torch.ones(5, 3))
    assert right(model, votes, labels) > right(MajorityVote(3).fit(votes), votes, labels) + 0.01


def test_where_abstaining_tells_of_the_class_it_may_be_an_outcome() -> None:
    votes, labels = plant(4000, [0.9] * 6)
    votes[:, :3][votes[:, :3] != 1] = -1  # each of these ever votes for one class
    votes[:, 3:][votes[:, 3:] != 0] = -1
    assert right(DawidSkene(2).fit(votes), votes, labels) > 0.97
    model = DawidSkene(2, abstain="ignore").fit(votes)
    torch.testing.assert_close(model.posterior(torch.full((1, 6), -1)), model.balance.unsqueeze(0))


# Triplets -------------------------------------------------------------------------------------------------------------


def population(inside: Tensor, outside: Tensor, balance: Tensor) -> Tensor:
    """Overlaps in the limit: P(v_j = l | y) is ``inside`` (M, C) for y = l, and ``outside`` elsewhere."""
    classes = len(balance)
    mu = torch.where(torch.eye(classes, dtype=torch.bool), inside.unsqueeze(2), outside.unsqueeze(2))
    joint = torch.einsum("jly,y,kmy->jlkm", mu, balance, mu)
    own = torch.einsum("jly,y->jl", mu, balance)
    for j in range(len(mu)):
        joint[j, :, j] = own[j].diag()
    return joint


def test_covariances_recover_planted_probabilities_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    outside = 0.05 + 0.15 * torch.rand(6, 4, generator=generator, dtype=torch.float64)
    inside = outside + 0.1 + 0.4 * torch.rand(6, 4, generator=generator, dtype=torch.float64)
    inside[5], outside[5] = outside[5].clone(), inside[5].clone()  # worse than chance
    balance = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    for average in ("median", "mean"):
        found = from_covariances(population(inside, outside, balance), balance, average)
        torch.testing.assert_close(found[0], inside)
        torch.testing.assert_close(found[1], outside)


@pytest.mark.parametrize("moments", ["covariances", "products"])
def test_triplets_recover_planted_accuracies(moments) -> None:
    accuracies = [0.9, 0.8, 0.7, 0.65, 0.6]
    votes, labels = plant(100_000, accuracies, cover=0.8)
    model = TripletMoments(2, moments=moments).fit(votes)
    torch.testing.assert_close(model.accuracies, torch.tensor(accuracies), atol=0.015, rtol=0)
    known = WeightedVote(2, accuracies).fit(votes)
    assert right(model, votes, labels) == pytest.approx(right(known, votes, labels), abs=0.003)


def test_products_are_off_for_several_classes_and_covariances_are_not() -> None:
    votes, _ = plant(50_000, [0.9, 0.8, 0.7, 0.65, 0.6], classes=4)
    true = torch.tensor([0.9, 0.8, 0.7, 0.65, 0.6])
    assert (TripletMoments(4).fit(votes).accuracies - true).abs().max() < 0.015
    assert (TripletMoments(4, moments="products").fit(votes).accuracies - true).abs().max() > 0.02


def test_the_median_survives_a_copy_and_the_mean_does_not() -> None:
    accuracies = [0.9, 0.75, 0.7, 0.65, 0.6, 0.6, 0.7]
    votes, _ = plant(100_000, accuracies)
    votes = torch.cat([votes, votes[:, 4:5]], 1)
    true = torch.tensor([*accuracies, 0.6])
    error = {a: (TripletMoments(2, average=a).fit(votes).accuracies - true).abs() for a in ("median", "mean")}
    assert error["median"].max() < 0.04
    assert error["mean"].max() > 0.08
    assert error["median"][:4].max() < 0.012


def test_triplets_of_a_matrix_of_rank_one() -> None:
    size = torch.tensor([[0.5, 0.2, 0.8, 0.3]], dtype=torch.float64)
    moments = size.unsqueeze(2) * size.unsqueeze(1)
    moments.diagonal(dim1=1, dim2=2).fill_(float("nan"))  # never read
    for average in ("median", "mean"):
        torch.testing.assert_close(triplets(moments, average), size)
    moments[0, 2, 3] = moments[0, 3, 2] = 0.0
    assert bool(triplets(moments, "median").isfinite().all())
    torch.testing.assert_close(triplets(torch.zeros(1, 3, 3)), torch.zeros(1, 3))


def test_a_pair_of_products_that_says_nothing_counts_as_nought() -> None:
    """As in FlyingSquid, whose mean is over all pairs."""
    size = torch.tensor([0.6, 0.8, 0.5, 0.7], dtype=torch.float64)
    moments = size.unsqueeze(1) * size
    moments[2, 3] = moments[3, 2] = 0.0
    moments.fill_diagonal_(1.0)
    same = torch.eye(2, dtype=torch.float64)
    joint = torch.einsum("jk,ac->jakc", (1 + moments) / 4, same) + torch.einsum(
        "jk,ac->jakc", (1 - moments) / 4, 1 - same
    )
    inside, outside = from_products(joint, torch.tensor([0.5, 0.5], dtype=torch.float64))
    accuracy = torch.tensor([2 * 0.6, 2 * 0.8, 0.5, 0.7], dtype=torch.float64) / 3
    torch.testing.assert_close(inside, ((1 + accuracy) / 2).unsqueeze(1).expand(4, 2))
    torch.testing.assert_close(outside, ((1 - accuracy) / 2).unsqueeze(1).expand(4, 2))


def test_chunks_of_triplets_change_nothing(monkeypatch) -> None:
    moments = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    whole = triplets(moments + moments.mT)
    monkeypatch.setattr("zoo.core.label_models.triplets._AT_ONCE", 1)
    assert torch.equal(whole, triplets(moments + moments.mT))


# Matrix completion ----------------------------------------------------------------------------------------------------


def test_completion_loss_by_brute_force_and_zero_at_the_truth() -> None:
    generator = torch.Generator().manual_seed(1)
    balance = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mu = torch.rand(4, 4, 3, generator=generator, dtype=torch.float64).softmax(1)[:, 1:]
    joint = torch.einsum("jly,y,kmy->jlkm", mu, balance, mu)
    for j in range(4):
        joint[j, :, j] = (mu[j] @ balance).diag()
    assert abs(float(completion_loss(mu, joint, balance))) < 1e-14
    other = torch.rand(4, 3, 3, generator=generator, dtype=torch.float64) / 3
    by_hand = (other @ balance - mu @ balance).square().sum()
    for j, k in itertools.permutations(range(4), 2):
        by_hand = by_hand + (joint[j, :, k] - other[j] @ balance.diag() @ other[k].T).square().sum()
    assert float(completion_loss(other, joint, balance)) == pytest.approx(float(by_hand), rel=1e-10)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
@pytest.mark.parametrize("balance", [[0.5, 0.5], [0.7, 0.3], [0.5, 0.3, 0.2]])
def test_matrix_completion_recovers_planted_accuracies(solver, balance) -> None:
    accuracies = [0.85, 0.8, 0.75, 0.7, 0.65, 0.8]
    votes, labels = plant(30_000, accuracies, classes=len(balance), cover=0.8, balance=balance)
    arguments = {"steps": 400, "lr": 0.05} if solver == "sgd" else {"steps": 60}
    model = MatrixCompletion(len(balance), solver=solver, balance=balance, **arguments).fit(votes)
    torch.testing.assert_close(model.accuracies, torch.tensor(accuracies), atol=0.03, rtol=0)
    known = WeightedVote(len(balance), accuracies, balance=balance).fit(votes)
    assert right(model, votes, labels) == pytest.approx(right(known, votes, labels), abs=0.006)


def test_classes_of_equal_frequency_are_put_in_their_places() -> None:
    mu = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 0.1
    mu = mu + 0.5 * torch.eye(4)
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    assert torch.equal(in_order(mu[:, :, [2, 0, 3, 1]], uniform), mu)
    pairs = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
    assert torch.equal(in_order(mu[:, :, [1, 0, 3, 2]], pairs), mu)
    mixed = mu[:, :, [2, 1, 0, 3]]  # would need classes of unequal frequency exchanged
    assert torch.equal(in_order(mixed, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)), mixed)


def test_completion_that_ends_with_classes_exchanged_puts_them_right() -> None:
    votes, _ = plant(20_000, [0.85, 0.8, 0.75, 0.7])
    model = MatrixCompletion(2, precision=0.3).fit(votes)  # begins where every function is mostly wrong
    torch.testing.assert_close(model.accuracies, torch.tensor([0.85, 0.8, 0.75, 0.7]), atol=0.03, rtol=0)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_large_penalty_keeps_completion_at_its_start(solver) -> None:
    votes, _ = plant(2000, [0.9, 0.9, 0.9, 0.9])
    free = MatrixCompletion(2, solver=solver, precision=0.6).fit(votes)
    held = MatrixCompletion(2, solver=solver, precision=0.6, l2=1e4, lr=1e-5).fit(votes)
    start = 0.6 if solver == "lbfgs" else 1 - 0.01 / 0.61  # sgd's start knows no wrong votes, and is clipped
    torch.testing.assert_close(held.accuracies, torch.full((4,), start), atol=0.02, rtol=0)
    assert float((free.accuracies - held.accuracies).abs().min()) > 0.05


def test_too_large_a_step_is_said() -> None:
    with pytest.raises(UserError, match="lr=1000"):
        MatrixCompletion(2, solver="sgd", lr=1000.0).fit(plant(100, [0.8] * 4)[0])


# What all of them keep ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_checkpoint_and_order_of_functions_and_classes(model, classes) -> None:
    balance = [0.6, 0.4] if classes == 2 else [0.5, 0.3, 0.2]
    votes, _ = plant(3000, [0.85, 0.8, 0.75, 0.7, 0.65], classes=classes, cover=0.8, balance=balance)
    made = model(classes, balance=balance).fit(votes)
    p = made.posterior(votes)
    torch.testing.assert_close(p.sum(1), torch.ones(3000))
    assert made(votes).dtype == torch.float32

    loaded = model(classes)
    assert not loaded.fitted
    loaded.load_state_dict(made.state_dict())
    assert torch.equal(loaded.posterior(votes), p)
    assert loaded.num_functions == 5
    assert not list(made.parameters())

    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(model(classes, balance=balance).fit(votes[:, order]).table, made.table[order])
    renamed = torch.where(votes < 0, votes, classes - 1 - votes)
    flipped = model(classes, balance=balance[::-1]).fit(renamed).posterior(renamed)
    torch.testing.assert_close(flipped.flip(1), p, atol=2e-3, rtol=0)


@pytest.mark.parametrize("model", ALL)
def test_a_function_that_always_abstains_is_named_and_changes_nothing(model) -> None:
    votes, _ = plant(500, [0.8, 0.7, 0.75, 0.8])
    plain = model(2).fit(votes)
    more = torch.cat([votes[:, :1], torch.full((500, 1), -1), votes[:, 1:]], 1)
    with pytest.warns(UserWarning, match=r"always abstaining, and left out: function 1 \('mute'\)"):
        made = model(2).fit(more, names=["a", "mute", "c", "d", "e"])
    torch.testing.assert_close(made.posterior(more), plain.posterior(votes))
    assert made.num_functions == 5
    assert torch.equal(made.table[1], torch.zeros(3, 2))


@pytest.mark.parametrize("model", [MatrixCompletion, TripletMoments])
def test_two_functions_are_too_few_for_moments(model) -> None:
    with pytest.raises(
        UserError, match=r"2 labelling functions vote, but it needs at least 3; always abst.* function 2"
    ):
        model(2).fit(torch.tensor([[0, 1, -1], [1, 1, -1]]))


@pytest.mark.parametrize("model", ALL)
def test_balance_uniform_estimated_given(model) -> None:
    votes, _ = plant(2000, [0.95] * 4, balance=[0.8, 0.2])
    assert float(model(2, balance="uniform").fit(votes).balance[0]) == 0.5
    assert float(model(2, balance="estimated").fit(votes).balance[0]) == pytest.approx(0.8, abs=0.03)
    assert float(model(2, balance=[3, 1]).fit(votes).balance[0]) == 0.75
    assert float(model(2).fit(votes, balance=[0.9, 0.1]).balance[0]) == pytest.approx(0.9)
    tied = torch.tensor([[0, 1, -1], [0, 0, 0], [-1, -1, -1], [0, 0, 0]])  # a tie counts half for both, silence nothing
    known = model(2, balance="estimated")._known_balance(tied, None, None)
    torch.testing.assert_close(known, torch.tensor([3.5, 1.5], dtype=torch.float64) / 5)
    few = votes[:3], torch.tensor([0, 0, 1])
    assert float(model(2, balance="labeled").fit(votes, labeled=few).balance[0]) == pytest.approx(3 / 5)


def test_bad_input() -> None:
    votes, _ = plant(20, [0.8] * 3)
    for balance in ([0.5], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan]):
        with pytest.raises(UserError, match=r"balance=.* must be 2 positive"):
            MajorityVote(2, balance=balance)
    with pytest.raises(UserError, match="balance='even' must be"):
        MajorityVote(2, balance="even")
    with pytest.raises(UserError, match="num_classes=1"):
        MajorityVote(1)
    with pytest.raises(UserError, match="nothing is known"):
        MajorityVote(2).posterior(votes)
    with pytest.raises(UserError, match="DawidSkene: function 0 votes"):
        DawidSkene(2).fit(votes + 1)
    with pytest.raises(UserError, match="empty"):
        DawidSkene(2).fit(votes[:0])
    with pytest.raises(UserError, match="0 labelling functions vote"):
        MajorityVote(2).fit(torch.full((4, 2), -1))
    model = MajorityVote(2).fit(votes)
    with pytest.raises(UserError, match="not those of the 3"):
        model.posterior(votes[:, :2])
    with pytest.raises(UserError, match="votes 5"):
        model.posterior(torch.full((1, 3), 5))
    with pytest.raises(UserError, match=r"labeled has votes \(3, 2\)"):
        model.fit(votes, labeled=(votes[:3, :2], torch.zeros(3)))
    for bad in ({"accuracies": [1.0, 0.5]}, {"accuracies": [0.5, 0.0]}):
        with pytest.raises(UserError, match="must lie in"):
            WeightedVote(2, **bad)
    with pytest.raises(UserError, match="2 accuracies for 3"):
        WeightedVote(2, [0.7, 0.7]).fit(votes)
    with pytest.raises(UserError, match="Did you mean 'outcome'"):
        DawidSkene(2, abstain="outcomes")
    for arguments in ({"smoothing": -1.0}, {"max_iterations": 0}, {"tolerance": -1.0}):
        with pytest.raises(UserError, match="DawidSkene"):
            DawidSkene(2, **arguments)
    for arguments in ({"precision": 1.0}, {"steps": 0}, {"lr": 0.0}, {"l2": -1.0}):
        with pytest.raises(UserError, match="MatrixCompletion"):
            MatrixCompletion(2, **arguments)
    with pytest.raises(UserError, match="smallest"):
        TripletMoments(2, smallest=0.5)


def test_fitting_inside_inference_mode_leaves_ordinary_tensors() -> None:
    votes, _ = plant(200, [0.8] * 3)
    for model in ALL:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = model(2).fit(votes)
        assert not made.table.is_inference()
