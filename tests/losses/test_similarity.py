import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from zoo.losses.similarity import aggregate, instance_similarity_loss, similarities, unfold

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "simmatch.json").read_text())


def double(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64)


def test_unfold_and_aggregate_by_hand() -> None:
    q, p, labels = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.8]]), torch.tensor([0, 1, 0])
    torch.testing.assert_close(aggregate(q, labels, 2), torch.tensor([[0.7, 0.3]]))
    # 0.1, 0.24, 0.04, normalised
    unfolded = unfold(q, p, labels)
    torch.testing.assert_close(unfolded, torch.tensor([[0.1, 0.24, 0.04]]) / 0.38)
    # classes reweighted: 0.7 · 0.2 and 0.3 · 0.8
    torch.testing.assert_close(aggregate(unfolded, labels, 2), torch.tensor([[0.14, 0.24]]) / 0.38)


def test_a_class_without_rows_and_one_that_is_impossible() -> None:
    q, labels = torch.tensor([[0.5, 0.5]]), torch.tensor([0, 2])
    assert aggregate(q, labels, 4).tolist() == [[0.5, 0.0, 0.5, 0.0]]
    assert unfold(q, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), labels).tolist() == [[1.0, 0.0]]
    assert unfold(q, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), labels).tolist() == [[0.0, 0.0]]  # no division by zero


def test_a_flat_prediction_unfolds_nothing() -> None:
    q = torch.randn(5, 8).softmax(1)
    torch.testing.assert_close(unfold(q, torch.full((5, 3), 1 / 3), torch.arange(8) % 3), q)


def test_loops_give_the_same() -> None:
    z, memory = normalize(torch.randn(3, 4)).double(), normalize(torch.randn(5, 4)).double()
    target, t = torch.randn(3, 5).double().softmax(1), 0.2
    wanted = 0.0
    for b in range(3):
        scores = torch.stack([z[b] @ memory[k] / t for k in range(5)]).exp()
        torch.testing.assert_close(similarities(z, memory, t)[b], scores / scores.sum())
        wanted = wanted - sum(target[b, k] * (scores[k] / scores.sum()).log() for k in range(5)) / 3
    torch.testing.assert_close(instance_similarity_loss(z, memory, target, t), wanted)


def test_targets_carry_no_gradient() -> None:
    z, target = torch.randn(3, 4, requires_grad=True), torch.full((3, 5), 0.2, requires_grad=True)
    instance_similarity_loss(z, torch.randn(5, 4), target, 0.1).backward()
    assert z.grad.any()
    assert target.grad is None


def test_golden() -> None:
    wanted = {name: torch.tensor(value, dtype=torch.float64) for name, value in GOLDEN["outputs"].items()}
    labels = torch.tensor(GOLDEN["inputs"]["bank_labels"])
    weak, strong, memory = (normalize(double(name)) for name in ("weak", "strong", "bank"))
    p, q = double("weak_logits").softmax(1), similarities(weak, memory, 0.1)
    torch.testing.assert_close(torch.lerp(aggregate(q, labels, 4), p, 0.9), wanted["targets"], atol=1e-6, rtol=1e-5)
    strong.requires_grad_()
    loss = instance_similarity_loss(strong, memory, unfold(q, p, labels), 0.1)
    assert loss.item() == pytest.approx(wanted["instance"].mean().item(), rel=1e-6)
    gradient = torch.autograd.grad(loss, strong)[0]
    torch.testing.assert_close(gradient, wanted["gradient"], atol=1e-6, rtol=1e-5)


def test_autocast_does_not_round_the_products() -> None:
    z, memory = normalize(torch.randn(6, 16)), normalize(torch.randn(9, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = similarities(z, memory, 0.05)
    torch.testing.assert_close(got, similarities(z, memory, 0.05))
    assert similarities(z.bfloat16(), memory, 0.05).dtype == torch.float32
