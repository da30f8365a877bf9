import torch

from zoo.losses import round_groups, worst_group_loss

LOSSES = torch.tensor([1.0, 3.0, 2.0, 6.0])
GROUPS = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])


def test_largest_mean_by_hand() -> None:
    assert worst_group_loss(LOSSES, GROUPS).item() == 4.0  # means 10 / 3, 4 and nothing
    assert worst_group_loss(LOSSES, GROUPS[:, :1]).item() == torch.tensor(10 / 3).item()
    assert worst_group_loss(LOSSES, torch.ones(4, 1)).item() == LOSSES.mean().item()


def test_gradient_is_that_of_the_worst_group_alone() -> None:
    losses = LOSSES.clone().requires_grad_()
    worst_group_loss(losses, GROUPS).backward()
    assert losses.grad.tolist() == [0.0, 0.0, 0.5, 0.5]


def test_a_batch_without_members_is_0_with_a_finite_gradient() -> None:
    losses = LOSSES.clone().requires_grad_()
    loss = worst_group_loss(losses, torch.zeros(4, 2))
    loss.backward()
    assert loss.item() == 0.0
    assert losses.grad.tolist() == [0.0] * 4


def test_order_of_samples_and_groups_does_not_matter() -> None:
    order = torch.tensor([2, 0, 3, 1])
    assert worst_group_loss(LOSSES[order], GROUPS[order]) == worst_group_loss(LOSSES, GROUPS)
    assert worst_group_loss(LOSSES, GROUPS[:, [2, 1, 0]]) == worst_group_loss(LOSSES, GROUPS)


def test_bfloat16_keeps_the_means() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert worst_group_loss(LOSSES + 2**-9, GROUPS).item() == 4.0 + 2**-9


def test_groups_of_rounds() -> None:
    rounds, labels = torch.tensor([[0, 2], [1, 1], [2, 0]]), torch.tensor([0, 1, 1])
    groups = round_groups(rounds, labels)
    assert groups.tolist() == [
        [True, False, False, True],
        [True, True, False, False],
        [False, False, True, True],
    ]
