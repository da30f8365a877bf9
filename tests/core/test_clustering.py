import itertools
import json

import pytest
import torch

from zoo.core.clustering import affinity, assign, cluster, draw_tasks, energy, prepare_tasks
from zoo.core.errors import UserError


def tasks(count=4, ways=3, shots=2, queries=6, dim=5, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(count, ways, 1, dim, generator=generator, dtype=torch.float64) * 2

    def around(number):
        noise = torch.randn(count, ways, number, dim, generator=generator, dtype=torch.float64)
        return (centers + spread * noise).flatten(1, 2)

    labels = torch.arange(ways).repeat_interleave(shots).expand(count, -1)
    return around(shots), labels, around(queries), torch.arange(ways).repeat_interleave(queries)


def lloyd(support, labels, query, rounds=100):
    """K-means by the book, one task at a time, with the support samples kept in their classes."""
    found = []
    for s, y, q in zip(support, labels, query, strict=True):
        classes = range(int(y.max()) + 1)
        means = torch.stack([s[y == k].mean(0) for k in classes])
        for _ in range(rounds):
            nearest = torch.tensor([min(classes, key=lambda k, x=x: float(((x - means[k]) ** 2).sum())) for x in q])
            means = torch.stack([torch.cat([s[y == k], q[nearest == k]]).mean(0) for k in classes])
        found.append(nearest)
    return torch.stack(found)


def test_without_neighbours_and_temperature_it_is_lloyd_with_a_fixed_support():
    support, labels, query, _ = tasks(spread=2.0)
    found = cluster(support, labels, query, temperature=0.0, tolerance=0.0)
    assert torch.equal(found.assignments[:, support.shape[1] :].argmax(2), lloyd(support, labels, query))


@pytest.mark.parametrize("prototype", ["mean", "mode", "medoid"])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.5, 0.3), (2.0, 0.1), (1.0, 0.0)])
def test_the_objective_never_rises_and_rows_sum_to_one(prototype, weight, temperature):
    support, labels, query, _ = tasks(spread=2.0)
    found = cluster(support, labels, query, prototype, weight, temperature=temperature, tolerance=0.0, rounds=30)
    assert (found.energies.diff(dim=0) <= 1e-9).all()
    assert found.energies[-1].sum() < found.energies[0].sum()
    torch.testing.assert_close(found.assignments.sum(2), torch.ones(4, 24, dtype=torch.float64))
    known = torch.nn.functional.one_hot(labels, 3).double()
    assert torch.equal(found.assignments[:, :6], known), "support samples keep their labels"


def test_the_objective_is_its_definition():
    generator = torch.Generator().manual_seed(1)
    d, w = torch.rand(1, 4, 3, generator=generator), torch.rand(1, 4, 4, generator=generator)
    z = torch.rand(1, 4, 3, generator=generator).softmax(2)
    expected = 0.0
    for p, k in itertools.product(range(4), range(3)):
        expected += float(z[0, p, k] * d[0, p, k] + 0.7 * z[0, p, k] * z[0, p, k].log())
        expected -= 0.5 * 1.3 * sum(float(w[0, p, q] * z[0, p, k] * z[0, q, k]) for q in range(4))
    assert float(energy(d, z, w, 1.3, 0.7)) == pytest.approx(expected, rel=1e-5)


def test_the_graph_is_symmetric_without_negative_eigenvalues_and_otherwise_plain():
    x = torch.randn(3, 10, 4, dtype=torch.float64)
    graph = affinity(x, 3)
    assert torch.equal(graph, graph.mT)
    assert (torch.linalg.eigvalsh(graph) > -1e-12).all()
    plain = affinity(x, 3, convex=False)
    assert (plain.sum(2) == 3).all()
    assert not plain.diagonal(dim1=1, dim2=2).any()
    off = ~torch.eye(10, dtype=torch.bool)
    torch.testing.assert_close(graph[:, off], ((plain + plain.mT) / 2)[:, off])


def test_assignments_are_those_of_the_reference(root):
    golden = json.loads((root / "tests" / "golden" / "slk.json").read_text())
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in golden["inputs"].items()}
    distances = torch.cdist(given["X"], given["C"]).square()[None]
    start = (-distances).softmax(2)
    start[0, :3] = torch.eye(3, dtype=torch.float64)[given["labels"].long()]
    found = assign(distances, given["W"][None], float(given["lambda"]), start, steps=600, tolerance=1e-9)
    expected = torch.tensor(golden["outputs"]["Z"], dtype=torch.float64)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)  # it stops at 1e-7 of its energy


def test_order_of_queries_and_names_of_classes_do_not_matter():
    support, labels, query, _ = tasks()
    found = cluster(support, labels, query, weight=0.5, temperature=0.5)
    order = torch.randperm(query.shape[1])
    shuffled = cluster(support, labels, query[:, order], weight=0.5, temperature=0.5)
    torch.testing.assert_close(shuffled.assignments[:, 6:], found.assignments[:, 6:][:, order])
    renamed = cluster(support, (labels + 1) % 3, query, weight=0.5, temperature=0.5)
    torch.testing.assert_close(renamed.assignments.roll(-1, dims=2), found.assignments)


def test_tasks_do_not_see_each_other():
    support, labels, query, _ = tasks()
    whole = cluster(support, labels, query, weight=0.5, tolerance=0.0, rounds=20)
    alone = cluster(support[1:2], labels[1:2], query[1:2], weight=0.5, tolerance=0.0, rounds=20)
    torch.testing.assert_close(whole.assignments[1:2], alone.assignments)


@pytest.mark.parametrize("prototype", ["mean", "mode", "medoid"])
def test_separate_classes_are_found(prototype):
    support, labels, query, truth = tasks(spread=0.05)
    support, query = prepare_tasks(support, query)
    found = cluster(support, labels, query, prototype, weight=0.1, temperature=0.05)
    assert torch.equal(found.assignments[:, 6:].argmax(2), truth.expand(4, -1))


def test_prepared_features_have_unit_length_before_the_shift_and_equal_means_after():
    support, _, query, _ = tasks()
    s, q = prepare_tasks(support, query, center=support.mean((0, 1)), shift=False)
    torch.testing.assert_close(q.norm(dim=2), torch.ones_like(q[..., 0]))
    s, q = prepare_tasks(support, query)
    torch.testing.assert_close(s.mean(1), q.mean(1))


def test_tasks_hold_the_right_samples_once():
    labels = torch.arange(6).repeat(20)
    labels[:5] = -1
    support, query = draw_tasks(labels, 50, 4, 2, 3, torch.Generator().manual_seed(0))
    assert support.shape == (50, 8)
    assert query.shape == (50, 12)
    for s, q in zip(support, query, strict=True):
        assert len(set(s.tolist()) | set(q.tolist())) == 20
        classes = labels[s].view(4, 2)
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0].tolist())) == 4
        assert torch.equal(labels[q].view(4, 3), classes[:, :1].expand(4, 3))
        assert (classes >= 0).all()


def test_what_cannot_be_drawn_or_clustered_is_refused():
    labels = torch.arange(3).repeat(4)
    with pytest.raises(UserError, match="ways=5, but there are only 3"):
        draw_tasks(labels, 1, 5, 1, 1, torch.Generator())
    with pytest.raises(UserError, match="only 4 samples"):
        draw_tasks(labels, 1, 3, 2, 3, torch.Generator())
    support, labels, query, _ = tasks()
    with pytest.raises(UserError, match="each of the 3 classes"):
        cluster(support, labels.clamp_min(1), query)
    with pytest.raises(UserError, match="do not fit"):
        cluster(support, labels[:, :2], query)
    with pytest.raises(UserError, match="weight=-1"):
        cluster(support, labels, query, weight=-1)
