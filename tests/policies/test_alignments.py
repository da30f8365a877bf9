from functools import partial

import pytest
import torch
from torch import Tensor

from zoo.core.errors import UserError
from zoo.policies import LabeledAlignment, MovingAlignment, QueueAlignment, TemperedAlignment, Threshold


def normalized(p: Tensor) -> Tensor:
    return p / p.sum(1, keepdim=True)


def test_queue_is_the_mean_of_the_last_batches() -> None:
    alignment, batches = QueueAlignment(4, length=3), torch.randn(8, 5, 4).softmax(-1)
    for t, p in enumerate(batches):
        aligned = alignment(p)
        mean = batches[max(0, t - 2) : t + 1].mean(dim=(0, 1))  # the batch itself is among them
        torch.testing.assert_close(aligned, normalized(p / mean))


def test_queue_that_never_saw_a_batch_changes_nothing() -> None:
    p = torch.randn(5, 4).softmax(-1)
    torch.testing.assert_close(QueueAlignment(4).eval()(p), p)
    torch.testing.assert_close(QueueAlignment(2, prior=[1.0, 3.0]).eval()(p[:, :2]), normalized(p[:, :2]))


def test_queue_prior_and_evaluation() -> None:
    alignment = QueueAlignment(2, length=1, prior=[3.0, 1.0])
    torch.testing.assert_close(alignment(torch.tensor([[0.5, 0.5]])), torch.tensor([[0.75, 0.25]]))
    alignment.eval()(torch.tensor([[0.9, 0.1]]))
    assert alignment.queue.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_means_near_zero_stay_finite(num_classes) -> None:
    p = torch.zeros(3, num_classes)
    p[:, 0] = 1.0
    for alignment in (QueueAlignment(num_classes), LabeledAlignment(num_classes)):
        aligned = alignment(p, labeled=(torch.zeros(2, num_classes), torch.zeros(2)))
        torch.testing.assert_close(aligned, p)


def test_labeled_means_of_the_step() -> None:
    alignment = LabeledAlignment(3, momentum=0.0, length=1)
    p, x = torch.randn(6, 3).softmax(-1), torch.randn(4, 3)
    for _ in range(2):
        aligned = alignment(p, labeled=(x, torch.zeros(4)))
        torch.testing.assert_close(aligned, normalized(p * x.softmax(1).mean(0) / p.mean(0)))


def test_labeled_means_as_released_start_uniform() -> None:
    alignment, uniform = LabeledAlignment(3, momentum=0.9, length=4), torch.full((3,), 1 / 3)
    p, x = torch.randn(2, 6, 3).softmax(-1), torch.randn(2, 4, 3)
    for t in range(2):
        aligned = alignment(p[t], labeled=(x[t], torch.zeros(4)))
    rows = [uniform, uniform, p[0].mean(0), p[1].mean(0)]
    labeled = 0.9 * (0.9 * uniform + 0.1 * x[0].softmax(1).mean(0)) + 0.1 * x[1].softmax(1).mean(0)
    torch.testing.assert_close(aligned, normalized(p[1] * labeled / torch.stack(rows).mean(0)))


def test_labeled_moving_averages() -> None:
    alignment, uniform = LabeledAlignment(3, momentum=0.9, length=None), torch.full((3,), 1 / 3)
    p, x = torch.randn(6, 3).softmax(-1), torch.randn(4, 3)
    aligned = alignment(p, labeled=(x, torch.zeros(4)))
    ratio = (0.9 * uniform + 0.1 * x.softmax(1).mean(0)) / (0.9 * uniform + 0.1 * p.mean(0))
    torch.testing.assert_close(aligned, normalized(p * ratio))


@pytest.mark.parametrize("kind", ["queue", "labeled", "moving"])
def test_two_ranks_are_one_process_on_the_joint_batch(on_ranks, kind) -> None:
    p, x = torch.randn(3, 8, 3).softmax(-1), torch.randn(3, 4, 3)

    def run(rank: int, ranks: int) -> Tensor:
        lengths = {"labeled": 2, "moving": None}
        made = QueueAlignment(3, length=2) if kind == "queue" else LabeledAlignment(3, 0.5, lengths[kind])
        return torch.stack(
            [made(a.chunk(ranks)[rank], labeled=(b.chunk(ranks)[rank], None)) for a, b in zip(p, x, strict=True)]
        )

    torch.testing.assert_close(torch.cat(on_ranks(lambda rank: run(rank, 2)), dim=1), run(0, 1))


def test_state_comes_back() -> None:
    evidence = {"labeled": (torch.randn(2, 3), torch.zeros(2))}
    for kind in (QueueAlignment, LabeledAlignment):
        first, second, p = kind(3, length=2), kind(3, length=2), torch.randn(4, 3).softmax(-1)
        first(p, **evidence)
        second.load_state_dict(first.state_dict())
        q = torch.randn(4, 3).softmax(-1)
        assert torch.equal(first(q, **evidence), second(q, **evidence))


def test_policies_hand_over_what_alignments_need() -> None:
    policy = Threshold(3, alignment=LabeledAlignment)
    policy(torch.randn(4, 3), labeled=(torch.randn(2, 3), torch.zeros(2)))
    with pytest.raises(UserError, match="labeled"):
        policy(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (QueueAlignment, {"length": 0}),
        (QueueAlignment, {"prior": [1.0]}),
        (LabeledAlignment, {"length": 0}),
        (LabeledAlignment, {"momentum": 1.0}),
    ],
)
def test_out_of_range(kind, arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        kind(3, **arguments)


def test_confidence_is_read_before_sharpening() -> None:
    targets, weights = Threshold(2, threshold=0.7, temperature=0.5, soft=True)(torch.tensor([[2 / 3, 1 / 3]]).log())
    torch.testing.assert_close(targets, torch.tensor([[0.8, 0.2]]))
    assert weights.tolist() == [0.0]  # 0.8 would pass


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
@pytest.mark.parametrize("alignment", [MovingAlignment, TemperedAlignment])
def test_moving_momentum_out_of_range(alignment, momentum) -> None:
    with pytest.raises(UserError, match=f"{alignment.__name__}: momentum={momentum}"):
        alignment(3, momentum=momentum)


@pytest.mark.parametrize("soft", [False, True])
def test_a_prediction_of_nothing_but_classes_that_the_prior_excludes_stays(soft) -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 1.0, 2.0]], requires_grad=True)
    alignment = MovingAlignment(3, prior=[0.0, 0.5, 0.5])
    aligned = alignment(logits.detach().softmax(1))
    torch.testing.assert_close(aligned[0], torch.tensor([1.0, 0.0, 0.0]))
    assert aligned[1, 0] == 0
    policy = Threshold(3, soft=soft, temperature=0.5, alignment=partial(MovingAlignment, prior=[0.0, 0.5, 0.5]))
    targets, weights = policy(logits)
    assert torch.isfinite(targets.float()).all()
    assert torch.isfinite(weights).all()
