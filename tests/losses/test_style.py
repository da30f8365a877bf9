import pytest
import torch

from zoo.losses import mix_styles

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=GENERATOR) * 2 + 1
PARTNERS = torch.tensor([1, 2, 0])


def test_mixed_statistics_by_loops() -> None:
    share = torch.tensor([1.0, 0.0, 0.25])
    mixed = mix_styles(X, share, PARTNERS, eps=1e-9)
    for i in range(3):
        for c in range(2):
            own, other = X[i, c], X[PARTNERS[i], c]
            mean = share[i] * own.mean() + (1 - share[i]) * other.mean()
            deviation = share[i] * own.std() + (1 - share[i]) * other.std()
            wanted = deviation * (own - own.mean()) / own.std() + mean
            assert torch.allclose(mixed[i, c], wanted, atol=1e-6)
    assert torch.allclose(mixed[0], X[0], atol=1e-7)
    assert mixed[1].mean((1, 2)).tolist() == pytest.approx(X[2].mean((1, 2)).tolist())


def test_positions_of_a_transformer() -> None:
    share = torch.tensor([0.3, 0.5, 0.9])
    tokens = mix_styles(X.flatten(2).transpose(1, 2), share, PARTNERS)
    assert torch.allclose(tokens.transpose(1, 2).view_as(X), mix_styles(X, share, PARTNERS))


def test_no_gradient_through_the_statistics() -> None:
    x = X.clone().requires_grad_()
    mix_styles(x, torch.tensor([0.2, 0.4, 0.6]), PARTNERS).sum().backward()
    deviation = (X.var((2, 3), keepdim=True) + 1e-6).sqrt()
    share = torch.tensor([0.2, 0.4, 0.6]).view(-1, 1, 1, 1)
    new = share * deviation + (1 - share) * deviation[PARTNERS]
    assert torch.allclose(x.grad, (new / deviation).expand_as(X))


def test_type_stays() -> None:
    assert mix_styles(X.bfloat16(), torch.ones(3), PARTNERS).dtype == torch.bfloat16
    assert torch.isfinite(mix_styles(torch.ones(3, 2, 4, 4), torch.ones(3), PARTNERS)).all()
