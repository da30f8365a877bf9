import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from zoo.losses.graph import graph_contrastive_loss, memory_smoothing, pseudo_label_graph

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "comatch.json").read_text())


def double(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64)


def unit(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, dtype=torch.float64))


def test_loops_over_pairs_give_the_same() -> None:
    p = (3 * torch.randn(7, 4, dtype=torch.float64)).softmax(1)
    first, second, t, threshold = unit(7, 5).requires_grad_(), unit(7, 5).requires_grad_(), 0.3, 0.2
    wanted, connected = 0.0, 0
    for i in range(7):
        edges = [1.0 if i == j else float(p[i] @ p[j]) * (float(p[i] @ p[j]) >= threshold) for j in range(7)]
        connected += sum(edge > 0 for edge in edges)
        similar = [(first[i] @ second[j] / t).exp() for j in range(7)]
        for j in range(7):
            wanted = wanted - edges[j] / sum(edges) * (similar[j] / sum(similar)).log() / 7
    assert 7 < connected < 49
    loss = graph_contrastive_loss(first, second, pseudo_label_graph(p, threshold), t)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(x, [first, second]) for x in (loss, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_graph_by_hand() -> None:
    p = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.0, 1.0]])
    # products 0.6 and 0.4 of the second with the others: one edge at a threshold of 0.5, and the loops, which are 1
    graph = pseudo_label_graph(p, 0.5)
    wanted = torch.tensor([[1 / 1.6, 0.6 / 1.6, 0], [0.6 / 1.6, 1 / 1.6, 0], [0, 0, 1.0]])
    torch.testing.assert_close(graph, wanted)
    assert torch.equal(pseudo_label_graph(p.requires_grad_(), 1.1), torch.eye(3))  # also loops that do not reach it
    assert not graph.requires_grad


def test_rows_sum_to_one_and_a_higher_threshold_has_fewer_edges() -> None:
    p = (2 * torch.randn(30, 5)).softmax(1)
    graphs = [pseudo_label_graph(p, threshold) for threshold in (0.0, 0.3, 0.8)]
    for graph in graphs:
        torch.testing.assert_close(graph.sum(1), torch.ones(30))
        assert (graph.diagonal() == graph.amax(1)).all()
    edges = [int((graph > 0).sum()) for graph in graphs]
    assert edges[0] == 900 > edges[1] > edges[2] > 30


def test_loops_only_is_info_nce() -> None:
    first, second = unit(6, 4), unit(6, 4)
    ours = graph_contrastive_loss(first, second, torch.eye(6), 0.2)
    torch.testing.assert_close(ours, cross_entropy(first @ second.T / 0.2, torch.arange(6)))
    hot = graph_contrastive_loss(first, second, torch.eye(6), 1e9)
    assert hot.item() == pytest.approx(math.log(6), rel=1e-6)


def test_smoothing_by_hand() -> None:
    p, q = torch.tensor([[0.8, 0.2]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    z, memory = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    near = math.e / (math.e + 1)  # softmax of (1, 0) at temperature 1
    got = memory_smoothing(p, z, memory, q, 1.0, 0.5)
    torch.testing.assert_close(got, torch.tensor([[0.4 + near / 2, 0.1 + (1 - near) / 2]]))
    assert torch.equal(memory_smoothing(p, z, memory, q, 1.0, 1.0), p)  # no memory
    assert torch.equal(memory_smoothing(p, z, torch.zeros(0, 2), torch.zeros(0, 2), 1.0, torch.tensor(1.0)), p)


def test_golden() -> None:
    smoothed, first = GOLDEN["outputs"]["smoothed"], GOLDEN["outputs"]["first"]
    p = double("weak_logits").softmax(1)
    p = p / p.mean(0)
    p = p / p.sum(1, keepdim=True)
    memory = normalize(double("queue")), double("queue_logits").softmax(1)
    pair = [normalize(double(name)).requires_grad_() for name in ("strong", "strong_2")]
    for share, wanted in ((0.9, smoothed), (1.0, first)):
        targets = memory_smoothing(p, normalize(double("weak")), *memory, 0.2, share)
        torch.testing.assert_close(targets, torch.tensor(wanted["targets"], dtype=torch.float64))
        graph = pseudo_label_graph(targets, 0.6)
        torch.testing.assert_close(graph, torch.tensor(wanted["graph"], dtype=torch.float64))
        loss = graph_contrastive_loss(*pair, graph, 0.2)
        assert loss.item() == pytest.approx(wanted["contrastive"], abs=1e-5)
        for ours, theirs in zip(torch.autograd.grad(loss, pair), ("first", "second"), strict=True):
            reference = torch.tensor(wanted[f"gradient_{theirs}"], dtype=torch.float64)
            torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)


def test_autocast_does_not_round_the_products() -> None:
    first, second = unit(6, 4), unit(6, 4)
    wanted = graph_contrastive_loss(first, second, torch.eye(6), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = graph_contrastive_loss(first.float(), second.float(), torch.eye(6), 0.1)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
