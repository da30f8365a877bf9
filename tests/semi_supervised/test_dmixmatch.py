from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo import DMixMatch, FixMatch
from zoo.core.errors import UserError
from zoo.losses import decoupled_cross_entropy, mixing_shares
from zoo.policies import Threshold


class Small(nn.Module):
    """A network of features and a head, without BatchNorm."""

    num_features = 5

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, num_outputs)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


def built(cls=DMixMatch, **arguments):
    torch.manual_seed(5)
    method = cls(network=Small, num_classes=3, policy=partial(Threshold, threshold=0.4), **arguments)
    method.configure_model()
    return method


def batch() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, weak, strong = (torch.randn(n, 4, generator=generator) for n in (4, 8, 8))
    return {
        "labeled": {"image": x, "label": torch.tensor([0, 1, 2, 1])},
        "unlabeled": {"weak": weak, "strong": strong},
    }


def drawn(method, b: dict[str, dict[str, Tensor]]) -> Tensor:
    torch.manual_seed(0)
    return method.training_step(b, 0)


def terms(method, b: dict[str, dict[str, Tensor]], progress: float) -> dict[str, Tensor]:
    """The loss terms at a point of training."""
    seen: dict[str, Tensor] = {}
    report = type(method).report

    class At(type(method)):
        progress = property(lambda self: self.point)

        def report(self, **values: Tensor) -> Tensor:
            seen.update(values)
            return report(self, **values)

    method.__class__, method.point = At, progress
    drawn(method, b)
    return seen


def test_without_mixtures_it_is_fixmatch_bit_for_bit() -> None:
    b = batch()
    method = built(mixed_labeled_weight=0.0, mixed_unlabeled_weight=0.0)
    fixmatch = built(FixMatch)  # its average and its weights are still the same: either labels
    losses = [drawn(m, b) for m in (method, fixmatch)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for mine, theirs in zip(method.network.parameters(), fixmatch.network.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_the_average_labels() -> None:
    b, method = batch(), built()
    with torch.no_grad():
        method.teacher.module.head.bias += torch.tensor([0.0, 0.0, 20.0])
    found = terms(method, b, 1.0)
    strong = method.network(b["unlabeled"]["strong"])
    torch.testing.assert_close(found["unlabeled"], cross_entropy(strong, torch.full((8,), 2)))


def test_mixtures_by_hand() -> None:
    b, method = batch(), built(eta=0.3, share_power=1.0)
    found = terms(method, b, 1.0)
    torch.manual_seed(0)
    partners = torch.randperm(4)
    lam = mixing_shares(8, 1.0)
    assert (lam >= 0.5).all()
    x, y, weak = b["labeled"]["image"], b["labeled"]["label"], b["unlabeled"]["weak"]
    a, u = lam[:4].unsqueeze(1), lam[4:].unsqueeze(1)

    def head(mixed: Tensor) -> Tensor:
        return method.mixture_head(method.network.features(mixed))

    expected = decoupled_cross_entropy(head(a * x + (1 - a) * x[partners]), y, y[partners], lam[:4], 0.3, 1.0)
    torch.testing.assert_close(found["mixed_labeled"], expected.mean())
    confidence, label = method.teacher(weak[:4]).softmax(1).max(1)
    kept = (confidence >= 0.4).float()
    assert 0 < kept.sum() < 4
    expected = decoupled_cross_entropy(head(u * x + (1 - u) * weak[:4]), y, label, lam[4:], 0.3, 1.0)
    torch.testing.assert_close(found["mixed_unlabeled"], (kept * expected).sum() / 4)
    assert found["supervised"].item() == pytest.approx(cross_entropy(method.network(x), y).item(), rel=1e-5)


def test_the_ramp_holds_back_what_is_mixed_with_pseudo_labels() -> None:
    at = {p: terms(built(), batch(), p)["mixed_unlabeled"].item() for p in (0.0, 0.5, 1.0)}
    assert at[0.0] == 0.0
    assert at[0.5] == pytest.approx(at[1.0] / 2)


def test_only_the_labeled_side_is_decoupled_on_request() -> None:
    method = built(eta=1.0, share_power=0.0, decoupled="labeled")
    logits = torch.randn(2, 3)
    a, b, lam = torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([0.6, 0.9])
    difference = method.mixture_loss(logits, a, b, lam, both=True) - method.mixture_loss(logits, a, b, lam, both=False)
    others = torch.stack([logits[0, 1:].logsumexp(0) - logits[0, 1], logits[1, [0, 2]].logsumexp(0) - logits[1, 2]])
    torch.testing.assert_close(difference, others)
    both, labeled = (terms(built(decoupled=kind), batch(), 1.0) for kind in ("both", "labeled"))
    assert labeled["mixed_unlabeled"] < both["mixed_unlabeled"]
    assert torch.equal(labeled["mixed_labeled"], both["mixed_labeled"])


def test_a_small_part_need_be_less_sure() -> None:
    weak = torch.tensor([[0.6, 0.2, 0.2]] * 3).log()
    refused = torch.zeros(3)
    share = torch.tensor([0.5, 0.35, 0.9])
    assert built(mixture_threshold=0.55).trusted(weak, refused, share).tolist() == [1.0, 0.0, 1.0]
    assert built(mixture_threshold=0.7).trusted(weak, refused, share).tolist() == [0.0] * 3
    assert built(mixture_threshold=0.7).trusted(weak, 1 - refused, share).tolist() == [1.0] * 3


def test_the_threshold_of_mixtures_is_used_and_none_is_the_policys() -> None:
    weights = {t: terms(built(mixture_threshold=t), batch(), 1.0)["mixed_unlabeled"].item() for t in (None, 0.01, 1.0)}
    assert weights[None] == weights[1.0] < weights[0.01]


@pytest.mark.parametrize("labeler", ["student", "teacher"])
def test_either_may_label(labeler) -> None:
    method = built(labeler=labeler, mixture_threshold=0.45)
    same = drawn(method, batch())
    with torch.no_grad():
        method.teacher.module.head.bias += torch.tensor([0.0, 0.0, 20.0])
    assert torch.equal(drawn(method, batch()), same) == (labeler == "student")


def test_gradients_reach_both_heads_and_not_the_average() -> None:
    method = built()
    drawn(method, batch()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.mixture_head.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(
    "arguments",
    [{"alpha": -1.0}, {"eta": -1.0}, {"mixture_threshold": 0.0}, {"decoupled": "no"}, {"mixed_labeled_weight": -1.0}],
)
def test_out_of_range(arguments) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        built(**arguments)


def test_unmixed_samples_do_not_ask_for_their_partners_class() -> None:
    method = built(eta=1.0, share_power=0.0)
    logits, first, second = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    share = torch.ones(4)
    both, own = (method.mixture_loss(logits, first, second, share, both=both) for both in (True, False))
    assert torch.equal(both, own)
