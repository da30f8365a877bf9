import json

import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.policies import FlexibleThreshold, MovingAlignment


def confident(classes: list[int], num_classes: int = 3) -> Tensor:
    """Logits that are sure of the classes; -1 is sure of none, and leans to class 0."""
    logits = 10.0 * torch.nn.functional.one_hot(torch.tensor(classes).clamp_min(0), num_classes).float()
    return torch.where(torch.tensor(classes)[:, None] < 0, 0.01 * logits, logits)


def policy(samples: int = 10, num_classes: int = 3, **arguments) -> FlexibleThreshold:
    made = FlexibleThreshold(num_classes, **arguments)
    made.prepare(torch.arange(samples))
    return made


def test_first_step_keeps_everything_and_the_next_one_by_hand() -> None:
    p = policy(10, threshold=0.9)
    assert p.thresholds().tolist() == [0.0] * 3
    targets, weights = p(confident([0, 0, 1, -1]), index=torch.tensor([0, 1, 2, 3]))
    assert targets.tolist() == [0, 0, 1, 0]
    assert weights.tolist() == [1.0] * 4  # β = 0: the step's own counts come into use at the next one
    # σ = (2, 1, 0), 7 samples unseen: β = (2/7, 1/7, 0)
    torch.testing.assert_close(p.thresholds(), 0.9 * torch.tensor([2 / 7 / (2 - 2 / 7), 1 / 7 / (2 - 1 / 7), 0.0]))


@pytest.mark.parametrize(
    ("mapping", "value"),
    [("convex", 0.5 / 1.5), ("linear", 0.5), ("log", 0.5849625)],  # log2 1.5
)
def test_mappings_without_warmup(mapping, value) -> None:
    p = policy(10, threshold=0.8, mapping=mapping, warmup=False)
    assert p.thresholds().tolist() == [0.0] * 3
    p(confident([0, 0, 1]), index=torch.arange(3))
    torch.testing.assert_close(p.thresholds(), 0.8 * torch.tensor([1.0, value, 0.0]))


def test_the_threshold_of_the_predicted_class_counts() -> None:
    p = policy(4, num_classes=2, threshold=0.9)
    p(confident([0, 0, 0, 0], 2), index=torch.arange(4))  # β = (1, 0)
    _, weights = p(torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.95, 0.05]]).log(), index=torch.arange(3))
    assert weights.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("num_classes", [2, 5, 1000])
def test_counters_are_a_count_of_the_last_confident_classes(num_classes) -> None:
    p, last = policy(40, num_classes, threshold=0.7), [-1] * 40
    for _ in range(50):
        index = torch.randint(40, (12,))  # with repetitions
        logits = confident(torch.randint(-1, min(num_classes, 7), (12,)).tolist(), num_classes)
        p(logits, index=index)
        for i, row in zip(index.tolist(), logits.softmax(1), strict=True):
            if row.max() >= 0.7:
                last[i] = int(row.argmax())
        assert p.classes.tolist() == last
        seen = torch.tensor([c for c in last if c >= 0], dtype=torch.long)
        assert torch.equal(p.counts, torch.bincount(seen, minlength=num_classes))
    assert p.thresholds().shape == (num_classes,)
    assert torch.isfinite(p.thresholds()).all()


def test_reference_figures(root) -> None:
    golden = json.loads((root / "tests/golden/flexmatch.json").read_text())
    given = golden["inputs"]
    for name, expected in golden["outputs"].items():
        p = policy(given["samples"], 4, threshold=given["threshold"], mapping="linear", warmup=name == "warmup")
        convex = policy(given["samples"], 4, threshold=given["threshold"], warmup=name == "warmup")
        for t in range(3):
            logits, index = torch.tensor(given["logits"][t]), torch.tensor(given["index"][t])
            assert convex(logits, index=index)[1].tolist() == expected["masks"][t]
            p(logits, index=index)
            torch.testing.assert_close(p.thresholds() / given["threshold"], torch.tensor(expected["beta"][t]))
            assert p.classes.tolist() == expected["classes"][t]


def test_two_ranks_are_one_process_on_the_joint_batch(on_ranks) -> None:
    steps = [(3 * torch.randn(8, 3), torch.randint(10, (8,))) for _ in range(5)]

    def run(rows: slice) -> dict[str, Tensor]:
        p = policy(10, threshold=0.7)
        weights = [p(logits[rows], index=index[rows])[1] for logits, index in steps]
        return {"weights": torch.stack(weights), "classes": p.classes, "counts": p.counts}

    joint = run(slice(None))
    parts = on_ranks(lambda rank: run(slice(4 * rank, 4 * rank + 4)))
    for part in parts:
        assert torch.equal(part["classes"], joint["classes"])
        assert torch.equal(part["counts"], joint["counts"])
    assert torch.equal(torch.cat([part["weights"] for part in parts], dim=1), joint["weights"])


def test_permutation_of_the_batch() -> None:
    logits, index, order = 3 * torch.randn(8, 3), torch.randperm(10)[:8], torch.randperm(8)
    first, second = policy(), policy()
    for p in (first, second):
        p(3 * torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), index=torch.arange(8))
    assert torch.equal(first(logits, index=index)[1][order], second(logits[order], index=index[order])[1])
    assert torch.equal(first.classes, second.classes)


def test_evaluation_does_not_move_it() -> None:
    p = policy().eval()
    p(confident([0, 1]), index=torch.tensor([0, 1]))
    assert p.counts.sum() == 0


def test_state_comes_back_whatever_its_size() -> None:
    p = policy(10)
    p(confident([0, 2]), index=torch.tensor([3, 7]))
    fresh = FlexibleThreshold(3)
    fresh.load_state_dict(p.state_dict())
    assert torch.equal(fresh.classes, p.classes)
    assert torch.equal(fresh.thresholds(), p.thresholds())
    fresh.prepare(torch.arange(10))  # a resume: what was restored stays
    assert fresh.counts.tolist() == [1, 0, 1]
    fresh.prepare(torch.arange(12))  # other data: from the beginning
    assert fresh.counts.tolist() == [0, 0, 0]
    assert fresh.classes.tolist() == [-1] * 12


def test_numbers_may_have_gaps() -> None:
    p = FlexibleThreshold(3)
    p.prepare(torch.tensor([5, 2, 9]))
    p(confident([1]), index=torch.tensor([9]))
    torch.testing.assert_close(p.thresholds(), 0.95 * torch.tensor([0.0, 0.5 / 1.5, 0.0]))  # of 3 samples


def test_alignment_comes_first() -> None:
    p = policy(4, num_classes=2, threshold=0.9, alignment=lambda c: MovingAlignment(c, prior=[1.0, 99.0]).eval())
    p.alignment.mean = torch.tensor([0.5, 0.5])
    targets, _ = p.train(False)(torch.tensor([[0.6, 0.4]]).log(), index=torch.tensor([0]))
    assert targets.tolist() == [1]


def test_errors_say_what_to_do() -> None:
    with pytest.raises(UserError, match=r"call prepare\(ids\)"):
        FlexibleThreshold(3)(torch.zeros(2, 3), index=torch.arange(2))
    with pytest.raises(UserError, match="'index'"):
        policy()(torch.zeros(2, 3))
    with pytest.raises(UserError, match="Did you mean 'convex'"):
        FlexibleThreshold(3, mapping="convx")
    with pytest.raises(UserError, match="threshold=0"):
        FlexibleThreshold(3, threshold=0)
