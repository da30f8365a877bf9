import torch

from zoo.core.distributed import (
    gather_across_ranks,
    gather_with_gradient,
    mean_across_ranks,
    sum_across_ranks,
    world_size,
)


def test_one_process_changes_nothing() -> None:
    x = torch.randn(3)
    assert world_size() == 1
    for function in (sum_across_ranks, mean_across_ranks, gather_across_ranks):
        assert function(x) is x


def test_two_ranks(on_ranks) -> None:
    def work(rank: int) -> list[torch.Tensor]:
        x = torch.tensor([1.0, 2.0]) * (rank + 1)
        return [sum_across_ranks(x), mean_across_ranks(x), gather_across_ranks(x), x]

    for rank, (total, mean, rows, x) in enumerate(on_ranks(work)):
        assert total.tolist() == [3.0, 6.0]
        assert mean.tolist() == [1.5, 3.0]
        assert rows.tolist() == [1.0, 2.0, 2.0, 4.0]
        assert x.tolist() == [1.0 + rank, 2.0 + 2 * rank]  # the argument is left alone


def test_a_gather_with_gradient_trains_like_one_process(on_ranks) -> None:
    x = torch.randn(6, 2)

    def gradient(rank: int, ranks: int = 2) -> torch.Tensor:
        weight = torch.ones(2, requires_grad=True)
        rows = gather_with_gradient(x.chunk(ranks)[rank] * weight)
        assert torch.equal(rows.detach(), x)
        return torch.autograd.grad((rows @ rows.T).square().sum(), weight)[0]

    torch.testing.assert_close(sum(on_ranks(gradient)) / 2, gradient(0, 1))  # the mean is what DDP takes
