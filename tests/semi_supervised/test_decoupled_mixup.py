import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo import DecoupledMixup, Supervised
from zoo.core.errors import UserError
from zoo.losses import boxes, decoupled_binary_cross_entropy, decoupled_cross_entropy, mixed_targets, mixing_shares


class Pixels(nn.Module):
    """Logits are the means of the image's channels, times one weight."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean(dim=(2, 3))


def built(cls=DecoupledMixup, **arguments):
    method = cls(network=Pixels, num_classes=3, **arguments)
    method.configure_model()
    return method


def batch(size: int = 6) -> dict[str, dict[str, Tensor]]:
    image = torch.randn(size, 3, 1, 1).expand(size, 3, 4, 4).contiguous()
    return {"labeled": {"image": image, "label": torch.arange(size) % 3}}


def drawn(method: DecoupledMixup, b: dict[str, dict[str, Tensor]], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return method.training_step(b, 0)


def test_nothing_mixed_and_nothing_decoupled_is_the_supervised_baseline_bit_for_bit() -> None:
    b = batch()
    losses = [
        drawn(m, b) for m in (built(alpha=0.0, eta=0.0), built(alpha=0.0, eta=0.0, mixing="cutmix"), built(Supervised))
    ]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize(("loss", "extra"), [("softmax", {"eta": 0.3, "share_power": 0.5}), ("binary", {"power": 0.5})])
def test_the_step_is_the_equation_on_its_draws(loss, extra, per_sample) -> None:
    b = batch()
    value = drawn(built(loss=loss, alpha=0.7, per_sample=per_sample, **extra), b)
    torch.manual_seed(0)
    partners = torch.randperm(6)
    share = mixing_shares(6 if per_sample else 1, 0.7, dominant=False)
    x, y = b["labeled"]["image"], b["labeled"]["label"]
    lam = share.view(-1, 1, 1, 1)
    z = (lam * x + (1 - lam) * x[partners]).mean(dim=(2, 3))
    if loss == "softmax":
        expected = decoupled_cross_entropy(z, y, y[partners], share, extra["eta"], extra["share_power"])
    else:
        expected = decoupled_binary_cross_entropy(z, y, y[partners], share, power=extra["power"])
    torch.testing.assert_close(value, expected.mean())
    assert per_sample == (len(share.unique()) > 1)


def test_cutmix_labels_go_by_what_is_left() -> None:
    # constant images, so a mixture's logits say how much of each is in it
    b = batch()
    value = drawn(built(mixing="cutmix", eta=0.0), b, seed=1)
    torch.manual_seed(1)
    partners = torch.randperm(6)
    pasted = boxes(mixing_shares(6, 1.0, dominant=False), 6, 4, 4)
    left = 1 - pasted.float().mean(dim=(1, 2, 3))
    x, y = b["labeled"]["image"].mean(dim=(2, 3)), b["labeled"]["label"]
    z = left.unsqueeze(1) * x + (1 - left.unsqueeze(1)) * x[partners]
    torch.testing.assert_close(value, cross_entropy(z, mixed_targets(y, y[partners], left, 3)))


def test_the_regularizer_has_a_gradient_of_its_own() -> None:
    gradients = []
    for eta in (0.0, 1.0):
        method = built(eta=eta)
        drawn(method, batch_of_two := {"labeled": {k: v.clone() for k, v in FIXED["labeled"].items()}}).backward()
        assert batch_of_two
        gradients.append(method.network.scale.grad.item())
    assert gradients[0] != pytest.approx(gradients[1])


FIXED = {"labeled": {"image": torch.arange(72.0).view(6, 3, 2, 2).sin(), "label": torch.arange(6) % 3}}


@pytest.mark.parametrize(
    "arguments",
    [{"alpha": -1.0}, {"eta": -0.1}, {"share_power": -1.0}, {"threshold": 0.0}, {"mixing": "fmix"}, {"loss": "hinge"}],
)
def test_out_of_range(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        built(**arguments)


def test_token_ids_cannot_be_mixed() -> None:
    b = batch()
    b["labeled"]["image"] = b["labeled"]["image"].long()
    with pytest.raises(UserError, match="DecoupledMixup computes with pixels"):
        built().training_step(b, 0)
