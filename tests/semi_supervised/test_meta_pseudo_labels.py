from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo import MetaPseudoLabels
from zoo.core.errors import UserError
from zoo.policies import Threshold


class Small(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def build(**arguments) -> MetaPseudoLabels:
    torch.manual_seed(0)
    method = MetaPseudoLabels(network=Small, num_classes=3, ramp=0.0, **arguments)
    method.configure_model()
    return method


def batch() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    labeled = {"image": torch.randn(6, 4), "label": torch.tensor([0, 1, 2, 0, 1, 2])}
    return {"labeled": labeled, "unlabeled": {"weak": torch.randn(9, 4), "strong": torch.randn(9, 4)}}


def gradient(method: MetaPseudoLabels, part: nn.Module) -> Tensor:
    b = batch()
    method.zero_grad()
    torch.manual_seed(3)
    method.training_step(b, 0).backward()
    return torch.cat([p.grad.flatten() for p in part.parameters()])


def test_feedback_is_the_product_of_the_two_gradients_for_small_steps() -> None:
    method, x = build(virtual_rate=1e-6), batch()["labeled"]
    method.double()
    image = x["image"].double()
    loss = cross_entropy(method.network(torch.randn(9, 4).double()), torch.randint(3, (9,)))
    parameters = list(method.network.parameters())
    ours = torch.autograd.grad(loss, parameters, retain_graph=True)
    labeled = torch.autograd.grad(cross_entropy(method.network(image), x["label"]), parameters)
    product = sum((a * b).sum() for a, b in zip(ours, labeled, strict=True))
    assert method.feedback(loss, image, x["label"]).item() == pytest.approx(1e-6 * product.item(), rel=1e-3)


def test_a_step_that_helps_has_positive_feedback_and_makes_its_pseudo_labels_likelier() -> None:
    method, b = build(consistency_weight=0.0), batch()
    x, labels = b["labeled"]["image"], b["labeled"]["label"]
    right = cross_entropy(method.network(x), labels)
    assert method.feedback(right, x, labels) > 0
    wrong = cross_entropy(method.network(x), (labels + 1) % 3)
    assert method.feedback(wrong, x, labels) < 0
    method.feedback = lambda *_: torch.tensor(1.0)
    with_feedback = gradient(method, method.tutor)
    method.feedback_weight = 0.0
    only = with_feedback - gradient(method, method.tutor)
    torch.manual_seed(3)
    strong = method.tutor(torch.cat([x, *(b["unlabeled"][v] for v in ("strong", "weak"))]))[6:15]
    drawn = (strong.detach() - torch.empty_like(strong).exponential_().log()).argmax(1)
    expected = torch.autograd.grad(cross_entropy(strong, drawn), list(method.tutor.parameters()))
    torch.testing.assert_close(only, torch.cat([g.flatten() for g in expected]), atol=1e-5, rtol=1e-4)


def test_loss_is_the_sum_of_its_four_terms() -> None:
    policy = partial(Threshold, threshold=0.45, temperature=0.7, soft=True)
    method, b = build(consistency_weight=3.0, feedback_weight=0.5, policy=policy), batch()
    method.feedback = lambda *_: torch.tensor(0.4)
    torch.manual_seed(3)
    loss = method.training_step(b, 0)
    torch.manual_seed(3)
    x, u = b["labeled"], b["unlabeled"]
    logits, strong, weak = method.tutor(torch.cat([x["image"], u["strong"], u["weak"]])).split([6, 9, 9])
    drawn = (strong.detach() - torch.empty_like(strong).exponential_().log()).argmax(1)
    q = (weak.detach() / 0.7).softmax(1)
    kept = (weak.softmax(1).max(1).values >= 0.45).float()
    assert 0 < kept.sum() < 9
    expected = cross_entropy(method.network(u["strong"]), drawn) + cross_entropy(logits, x["label"])
    expected = expected + 3 * (kept * cross_entropy(strong, q, reduction="none")).mean()
    torch.testing.assert_close(loss, expected + 0.5 * 0.4 * cross_entropy(strong, drawn))


def test_the_virtual_step_changes_nothing() -> None:
    method, b = build(), batch()
    loss = cross_entropy(method.network(b["unlabeled"]["strong"]), torch.randint(3, (9,)))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.feedback(loss, b["labeled"]["image"], b["labeled"]["label"])
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())


def test_the_student_learns_from_pseudo_labels_alone() -> None:
    method = build()
    learned = gradient(method, method.network)
    method.feedback_weight = method.consistency_weight = 0.0
    torch.testing.assert_close(gradient(method, method.network), learned)
    b = batch()
    torch.manual_seed(3)
    strong = method.tutor(torch.cat([b["labeled"]["image"], b["unlabeled"]["strong"], b["unlabeled"]["weak"]]))[6:15]
    drawn = (strong.detach() - torch.empty_like(strong).exponential_().log()).argmax(1)
    loss = cross_entropy(method.network(b["unlabeled"]["strong"]), drawn)
    expected = torch.autograd.grad(loss, list(method.network.parameters()))
    torch.testing.assert_close(learned, torch.cat([g.flatten() for g in expected]), atol=1e-6, rtol=1e-4)


def test_pseudo_labels_are_drawn_as_the_tutor_believes() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(20000, 3)
    drawn = (logits - torch.empty_like(logits).exponential_().log()).argmax(1)
    torch.testing.assert_close(drawn.bincount() / 20000, logits[0].softmax(0), atol=0.02, rtol=0)


def test_student_and_tutor_share_nothing_and_the_student_is_evaluated() -> None:
    method = build()
    assert not {p.data_ptr() for p in method.network.parameters()} & {p.data_ptr() for p in method.tutor.parameters()}
    x = torch.randn(3, 4)
    assert torch.equal(method.eval()(x), method.network(x))


@pytest.mark.parametrize("arguments", [{"consistency_weight": -1.0}, {"feedback_weight": -1.0}, {"virtual_rate": 0.0}])
def test_arguments_out_of_range_are_named(arguments) -> None:
    (name,) = arguments
    with pytest.raises(UserError, match=f"{name}="):
        build(**arguments)


class Dropping(Small):
    """Drops more of the hidden units than a small step can matter."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[3](nn.functional.dropout(self.layers[:3](x), 0.5, self.training))


def test_feedback_is_of_the_step_and_not_of_dropped_units() -> None:
    method, b = MetaPseudoLabels(network=Dropping, num_classes=3, virtual_rate=1e-5), batch()
    method.configure_model()
    torch.manual_seed(0)
    loss = cross_entropy(method.network(b["unlabeled"]["strong"]), torch.randint(3, (9,)))
    helped = [method.feedback(loss, b["labeled"]["image"], b["labeled"]["label"]) for _ in range(5)]
    assert torch.stack(helped).abs().max() < 1e-3, "no step of 1e-5 does more"


def test_feedback_is_not_rounded_under_autocast() -> None:
    method, b = build(virtual_rate=1e-2), batch()
    loss = cross_entropy(method.network(b["unlabeled"]["strong"]), torch.randint(3, (9,)))
    plain = method.feedback(loss, b["labeled"]["image"], b["labeled"]["label"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.feedback(loss, b["labeled"]["image"], b["labeled"]["label"]), plain)


def test_what_is_frozen_in_the_student_stays_out_of_the_virtual_step() -> None:
    method, b = build(), batch()
    method.network.layers[0].requires_grad_(False)
    method.training_step(b, 0).backward()
    assert method.network.layers[0].weight.grad is None
    assert method.network.layers[3].weight.grad.any()
