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


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 7, 3)])
def test_styles_are_the_partners(shape) -> None:
    x, partners = torch.randn(shape).double() * 2 + 1, torch.tensor([1, 0, 3, 2])
    axes = (2, 3) if len(shape) == 4 else (1,)
    swapped = mix_styles(x, torch.zeros(4), partners, eps=0.0)
    assert torch.allclose(swapped.mean(axes), x.mean(axes)[partners])
    assert torch.allclose(swapped.std(axes, correction=0), x.std(axes, correction=0)[partners])
    half = mix_styles(x, torch.full((4,), 0.25), partners, eps=0.0)
    assert torch.allclose(half.mean(axes), 0.25 * x.mean(axes) + 0.75 * x.mean(axes)[partners])


def test_own_style_is_exactly_the_same_and_statistics_are_constants() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    assert torch.equal(mix_styles(x, torch.ones(4), torch.tensor([1, 0, 3, 2])), x)
    assert torch.equal(mix_styles(x, torch.rand(4), torch.arange(4)), x)
    mixed = mix_styles(x, torch.zeros(4), torch.tensor([1, 0, 3, 2]), eps=0.0)
    ratio = (x.std((2, 3), correction=0)[[1, 0, 3, 2]] / x.std((2, 3), correction=0)).detach()
    gradient = torch.autograd.grad(mixed.sum(), x)[0]
    assert torch.allclose(gradient, ratio[..., None, None].expand_as(x), atol=1e-5)


def test_one_position_has_no_style_of_its_own_scale() -> None:
    """Its standard deviation is 0, and not undefined: only the mean is mixed."""
    x = torch.tensor([[[1.0, 2.0]], [[5.0, 4.0]]])  # (2, 1, 2)
    mixed = mix_styles(x, torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))
    assert torch.allclose(mixed, torch.tensor([[[2.0, 2.5]], [[5.0, 4.0]]]), atol=1e-5)
    maps = mix_styles(x[..., None].transpose(1, 2), torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))
    assert torch.equal(maps.flatten(1), mixed.flatten(1))
