import torch

from zoo.losses import weighted_mean


def test_by_hand() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    mean = weighted_mean(losses, torch.tensor([1.0, 0.0, 0.5]))
    assert mean.item() == 2.0  # (1 + 2) / 1.5
    mean.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([1 / 1.5, 0.0, 0.5 / 1.5]))


def test_equal_weights_are_the_mean_whatever_they_are() -> None:
    losses = torch.rand(7)
    for weight in (1.0, 0.01):
        torch.testing.assert_close(weighted_mean(losses, torch.full((7,), weight)), losses.mean())


def test_no_weight_is_zero_with_a_zero_gradient() -> None:
    losses = torch.rand(3, requires_grad=True)
    mean = weighted_mean(losses, torch.zeros(3))
    mean.backward()
    assert mean.item() == 0.0
    assert not losses.grad.any()


def test_mean_over_two_ranks_is_that_of_the_joint_batch(on_ranks) -> None:
    losses, weights = torch.rand(6), torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 1.0])

    def work(rank: int) -> torch.Tensor:
        return weighted_mean(losses[3 * rank : 3 * rank + 3], weights[3 * rank : 3 * rank + 3])

    torch.testing.assert_close(torch.stack(on_ranks(work)).mean(), weighted_mean(losses, weights))
