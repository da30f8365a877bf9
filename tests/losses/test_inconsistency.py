import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from zoo.losses import (
    gradient_size,
    gradient_variance_gap,
    head_gradient_moments,
    head_gradient_norms,
    logit_gradients,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "udim.json").read_text())
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def head(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(6, 4).double(), torch.randn(3, 4).double(), torch.randn(3).double()


def sample_gradients(h, weight, bias, labels):
    def loss(weight, bias, h, label):
        return F.cross_entropy(h @ weight.T + bias, label)

    return torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0, 0))(weight, bias, h, labels)


def test_closed_form_is_the_gradient_of_every_sample() -> None:
    h, weight, bias = head()
    of_weight, of_bias = sample_gradients(h, weight, bias, LABELS)
    z = h @ weight.T + bias
    assert torch.allclose(logit_gradients(z, LABELS), of_bias, atol=1e-12)
    norms = head_gradient_norms(h, z, LABELS)
    assert torch.allclose(norms[0], of_weight.square().sum(dim=(1, 2)), atol=1e-12)
    assert torch.allclose(norms[1], of_bias.square().sum(dim=1), atol=1e-12)
    mean, square = head_gradient_moments(h, z, LABELS)
    assert torch.allclose(mean, torch.cat([of_weight, of_bias.unsqueeze(2)], dim=2).mean(dim=0), atol=1e-12)
    assert torch.allclose(square, torch.cat([of_weight, of_bias.unsqueeze(2)], dim=2).square().mean(dim=0), atol=1e-12)


def test_two_equally_likely_classes_by_hand() -> None:
    z, h = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert logit_gradients(z, torch.tensor([1])).tolist() == [[0.5, -0.5]]
    norms = head_gradient_norms(h, z, torch.tensor([1]))
    assert (norms[0].item(), norms[1].item()) == (12.5, 0.5)  # ½ · 25 and ½
    assert gradient_size(h, z, torch.tensor([1])).item() == pytest.approx(12.5 / 4 + 0.5 / 2)
    assert gradient_size(h, z, torch.tensor([1]), bias=False).item() == pytest.approx(12.5 / 4)


@pytest.mark.parametrize("bias", [True, False])
def test_gap_is_the_distance_of_both_variances_from_their_average(bias) -> None:
    h, weight, b = head()
    other = head(1)[0]
    g, g_other = (
        torch.cat([w.flatten(1), d], dim=1) if bias else w.flatten(1)
        for w, d in (sample_gradients(x, weight, b, LABELS) for x in (h, other))
    )
    v, v_other = (g - g.mean(dim=0)).square().mean(dim=0), (g_other - g.mean(dim=0)).square().mean(dim=0)
    average = (v + v_other) / 2
    wanted = ((v - average).square().mean() + (v_other - average).square().mean()) / 2
    ours = gradient_variance_gap((h, h @ weight.T + b), (other, other @ weight.T + b), LABELS, bias)
    assert torch.allclose(ours, wanted, atol=1e-14)


def test_alike_domains_have_no_gap_and_certain_right_predictions_no_gradient() -> None:
    h, weight, b = head()
    z = h @ weight.T + b
    assert gradient_variance_gap((h, z), (h.clone(), z.clone()), LABELS).item() == 0.0
    certain = 1e3 * F.one_hot(LABELS, 3).double()
    assert gradient_size(h, certain, LABELS).item() == 0.0
    for loss in (gradient_variance_gap((h, certain), (h, z), LABELS), gradient_size(h, certain, LABELS)):
        assert torch.isfinite(loss)


def test_order_of_the_samples_does_not_matter() -> None:
    h, weight, b = head()
    other = head(1)[0]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    one, two = (
        gradient_variance_gap((x, x @ weight.T + b), (y, y @ weight.T + b), labels)
        for x, y, labels in ((h, other, LABELS), (h[order], other[order], LABELS[order]))
    )
    assert torch.allclose(one, two, atol=1e-14)


def test_gradients_flow_through_both_domains() -> None:
    torch.manual_seed(0)

    def loss(h, other, weight, b):
        source, perturbed = (h, h @ weight.T + b), (other, other @ weight.T + b)
        return gradient_variance_gap(source, perturbed, LABELS) + gradient_size(*perturbed, LABELS)

    tensors = [*head(), head(1)[0]]
    h, weight, b, other = (t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(loss, (h, other, weight, b))


def test_figures_of_the_authors_code() -> None:
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in GOLDEN["inputs"].items()}
    labels = given["labels"].long()
    source, perturbed = ((h, h @ given["weight"].T + given["bias"]) for h in (given["features"], given["perturbed"]))
    gap, size = gradient_variance_gap(source, perturbed, labels), gradient_size(*perturbed, labels)
    assert gap.item() == pytest.approx(GOLDEN["outputs"]["variance_gap"], rel=1e-10)
    assert size.item() == pytest.approx(GOLDEN["outputs"]["size"], rel=1e-10)
