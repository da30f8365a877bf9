import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoo import FixMatch, ShrinkMatch
from zoo.core.errors import UserError
from zoo.core.heads import MLP, Linear
from zoo.losses.shrink import shrink_loss, shrunk_space
from zoo.policies import Alignment, Threshold
from zoo.policies.alignment import QueueAlignment
from zoo.semi_supervised.shrinkmatch import AuxiliaryHead

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "shrinkmatch.json").read_text())


class Given(nn.Module):
    """Features are the input, logits are the features times one weight: a batch spells out the predictions."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_features = num_outputs
        self.scale = nn.Parameter(torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        return x

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * features

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


class Identity(nn.Module):
    """An auxiliary head that says what the features say."""

    def __init__(self, in_features: int, num_outputs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * features


class BatchAlignment(Alignment):
    """By the batch's own mean."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()

    def forward(self, probabilities: Tensor, **evidence) -> Tensor:
        scaled = probabilities / probabilities.mean(0)
        return scaled / scaled.sum(1, keepdim=True)


def method(cls: type = ShrinkMatch, classes: int = 5, **arguments):
    if cls is ShrinkMatch:
        arguments = {"auxiliary": Identity, "alignment": lambda _: Alignment(), "threshold": 0.8, **arguments}
    made = cls(network=Given, num_classes=classes, **arguments)
    made.configure_model()
    return made


def batch(classes: int = 5, size: int = 12) -> dict[str, dict[str, Tensor]]:
    labeled = {"image": torch.randn(4, classes), "label": torch.arange(4) % classes}
    weak = torch.randn(size, classes) * torch.linspace(0.5, 5, size).unsqueeze(1)
    return {"labeled": labeled, "unlabeled": {"weak": weak, "strong": torch.randn(size, classes, requires_grad=True)}}


def terms(made: ShrinkMatch, b: dict[str, dict[str, Tensor]], batch_idx: int = 0) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    report = made.report
    made.report = lambda **values: kept.update(values) or report(**values)  # type: ignore[method-assign]
    made.training_step(b, batch_idx)
    return kept


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("forward_pass", ["joint", "split"])
def test_the_loss_by_hand(soft, forward_pass) -> None:
    b = batch()
    weak, strong = b["unlabeled"]["weak"], b["unlabeled"]["strong"]
    p = weak.softmax(1)
    certain = p.amax(1) >= 0.8
    assert 0 < certain.sum() < 12
    fitted = cross_entropy(strong, p if soft else p.argmax(1), reduction="none")
    shrunk = p.amax(1) * shrink_loss(strong, *shrunk_space(p, 0.8))
    assert shrunk[~certain].any()
    got = terms(method(soft_targets=soft, forward_pass=forward_pass, unlabeled_weight=0.5), b)
    torch.testing.assert_close(got["supervised"], cross_entropy(b["labeled"]["image"], b["labeled"]["label"]))
    torch.testing.assert_close(got["unlabeled"], 0.5 * fitted[certain].sum() / 12)
    torch.testing.assert_close(got["shrunk"], 0.5 * certain.float().mean() * shrunk[~certain].sum() / 12)


def test_raw_probabilities_are_those_before_alignment() -> None:
    given, wanted = GOLDEN["inputs"], GOLDEN["outputs"]["stl"]

    made = method(
        classes=7, threshold=0.95, soft_targets=False, confidence_from="raw", alignment=BatchAlignment
    )  # the released STL-10 and SVHN code
    weak, aux = torch.tensor(given["weak_logits"]), torch.tensor(given["auxiliary_logits"])
    b = {
        "labeled": {"image": torch.randn(2, 7), "label": torch.arange(2)},
        "unlabeled": {"weak": weak, "strong": aux},
    }
    # the head for certain samples is given other logits by the release, the shrunk term is not
    assert terms(made, b)["shrunk"].item() == pytest.approx(wanted["mask"] * wanted["shrink"], rel=1e-5)


def test_with_a_ratio_of_zero_it_is_fixmatch_with_alignment() -> None:
    b = batch()
    shrink = method(ratio_momentum=1.0, alignment=partial(QueueAlignment, length=3))
    fixmatch = method(
        FixMatch, policy=partial(Threshold, threshold=0.8, soft=True, alignment=partial(QueueAlignment, length=3))
    )
    shrink.certain_ratio.value = torch.zeros(())
    for _ in range(3):
        losses = [m.training_step(b, 0) for m in (shrink, fixmatch)]
        torch.testing.assert_close(*losses)
        gradients = [
            torch.autograd.grad(loss, m.network.scale)[0] for loss, m in zip(losses, (shrink, fixmatch), strict=True)
        ]
        torch.testing.assert_close(*gradients)


def test_all_certain_shrinks_nothing() -> None:
    made = method(threshold=0.01)
    got = terms(made, batch())
    assert got["shrunk"].item() == 0
    assert got["unlabeled"] > 0
    assert made.certain_ratio.value == 1


def test_only_the_auxiliary_head_and_the_features_learn_from_shrunk_spaces() -> None:
    b = batch()
    b["unlabeled"]["weak"].requires_grad_()
    made = method()
    shrunk = terms(made, b)["shrunk"]
    gradients = torch.autograd.grad(
        shrunk,
        [made.network.scale, made.auxiliary.scale, b["unlabeled"]["strong"], b["unlabeled"]["weak"]],
        allow_unused=True,
    )
    assert gradients[0] is None
    assert gradients[1] != 0
    certain = b["unlabeled"]["weak"].softmax(1).amax(1) >= 0.8
    assert gradients[2][~certain].any()
    assert not gradients[2][certain].any()
    assert gradients[3] is None or not gradients[3].any()


def certain_share(share: float) -> dict[str, dict[str, Tensor]]:
    b = batch(size=4)
    b["unlabeled"]["weak"] = torch.zeros(4, 5)
    b["unlabeled"]["weak"][: int(4 * share), 0] = 50.0
    return b


def test_the_ratio_starts_at_the_first_share_and_moves_before_it_is_used() -> None:
    made = method(ratio_momentum=0.5)
    seen = []
    for step, share in enumerate((0.5, 1.0, 0.0)):
        made.training_step(certain_share(share), step)
        seen.append(made.certain_ratio.value.item())
    assert seen == [0.5, 0.75, 0.375]
    made.training_step(certain_share(0.25), 0)  # a new epoch
    assert made.certain_ratio.value.item() == (0.375 + 0.25) / 2
    made.eval()
    made.training_step(certain_share(1.0), 1)
    assert made.certain_ratio.value.item() == (0.375 + 0.25) / 2


def test_the_release_forgets_the_ratio_at_every_epoch() -> None:
    made = method(ratio_momentum=0.5, reset_each_epoch=True)
    for step, share in ((0, 0.5), (1, 1.0), (0, 0.25)):
        made.training_step(certain_share(share), step)
    assert made.certain_ratio.value.item() == 0.25


def test_the_ratio_of_two_ranks_is_that_of_the_joint_batch(on_ranks) -> None:
    certain = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def work(rank: int) -> Tensor:
        return method().certain_ratio(certain.chunk(2)[rank])

    assert [ratio.item() for ratio in on_ranks(work)] == [0.75, 0.75]


def test_state_survives_a_checkpoint() -> None:
    made, other = (method(alignment=partial(QueueAlignment, length=3), ratio_momentum=0.9) for _ in range(2))
    for step in range(2):
        made.training_step(batch(), step)
    other.load_state_dict(made.state_dict())
    b = batch()
    assert torch.equal(made.training_step(b, 2), other.training_step(b, 2))
    assert torch.equal(made.certain_ratio.value, other.certain_ratio.value)


def test_the_auxiliary_head_is_the_papers_and_may_be_another() -> None:
    made = method(auxiliary=AuxiliaryHead)
    widths = [layer.out_features for layer in made.auxiliary.modules() if isinstance(layer, nn.Linear)]
    assert widths == [1, 1, 5]
    assert made.auxiliary(torch.randn(3, 5)).shape == (3, 5)
    for head in (MLP, Linear):
        assert torch.isfinite(method(auxiliary=head).training_step(batch(), 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 2}, "num_classes=2 must be at least 3"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"confidence_from": "both"}, "confidence_from='both'"),
        ({"ratio_momentum": 1.5}, "ratio_momentum=1.5"),
        ({"unlabeled_weight": -1.0}, "unlabeled_weight=-1.0"),
    ],
)
def test_mistakes(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        method(**arguments)
