"""Activation maps and label rules, by hand."""

import pytest
import torch

from zoo.weak_segmentation.maps import class_activation_maps, multi_scale_maps, normalize_maps, pseudo_labels


def test_the_mean_of_a_map_is_the_logit_without_its_bias():
    features = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    head = torch.nn.Linear(5, 7, dtype=torch.float64)
    logits = head(features.mean((2, 3)))
    maps = class_activation_maps(features, head.weight)
    torch.testing.assert_close(maps.mean((2, 3)), logits - head.bias)


def test_a_map_by_hand():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])  # (1, 2, 1, 2)
    weight = torch.tensor([[2.0, 1.0], [0.0, -1.0]])
    expected = torch.tensor([[[[5.0, 3.0]], [[-3.0, 1.0]]]])
    torch.testing.assert_close(class_activation_maps(features, weight), expected)


def test_maps_refuse_a_head_of_another_width():
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        class_activation_maps(torch.rand(1, 5, 2, 2), torch.rand(4, 3))


def test_normalized_maps_span_zero_to_one_and_absent_classes_are_zero():
    maps = torch.tensor([[[[-2.0, 1.0, 4.0]], [[1.0, 2.0, 3.0]], [[-3.0, -2.0, -1.0]]]])
    expected = torch.tensor([[[[0.0, 0.25, 1.0]], [[0.0, 0.5, 1.0]], [[0.0, 0.0, 0.0]]]])
    torch.testing.assert_close(normalize_maps(maps), expected, atol=1e-5, rtol=0)
    tagged = normalize_maps(maps, torch.tensor([[0.0, 1.0, 1.0]]))
    assert tagged[0, 0].abs().sum() == 0
    torch.testing.assert_close(tagged[0, 1], expected[0, 1], atol=1e-5, rtol=0)
    assert normalize_maps(maps, torch.zeros(1, 3)).abs().sum() == 0  # an image without tags


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, 0), (0.2, 0), (0.25, 0), (0.26, 255), (0.7, 255), (0.71, 2), (1.0, 2)]
)
def test_label_rule_at_its_boundaries(value, expected):
    scores = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    scores[0, 1] = value
    assert pseudo_labels(scores, low=0.25, high=0.7).item() == expected


def test_one_threshold_labels_every_pixel():
    scores = torch.tensor([0.2, 0.5, 0.51]).view(1, 1, 1, 3)  # one class
    assert pseudo_labels(scores, 0.5).tolist() == [[[0, 0, 1]]]
    assert pseudo_labels(torch.zeros(2, 4, 3, 3), 0.0).abs().sum() == 0  # nothing is present: background


def test_crossed_thresholds_are_refused():
    with pytest.raises(ValueError, match=r"high=0.2 is below low=0.5"):
        pseudo_labels(torch.rand(1, 1, 2, 2), 0.5, 0.2)


def test_scales_add_up_and_mirrors_take_the_larger():
    image = torch.rand(2, 3, 8, 8)
    identity = lambda x: x - 0.5  # noqa: E731
    torch.testing.assert_close(multi_scale_maps(identity, image), (image - 0.5).relu())
    torch.testing.assert_close(multi_scale_maps(identity, image, (1.0, 1.0)), 2 * (image - 0.5).relu())
    torch.testing.assert_close(multi_scale_maps(identity, image, flip=True), (image - 0.5).relu())
    position = lambda x: torch.linspace(0, 1, x.shape[-1]).expand(len(x), 1, *x.shape[-2:])  # noqa: E731
    ramp = position(image)
    torch.testing.assert_close(multi_scale_maps(position, image, flip=True), torch.maximum(ramp, ramp.flip(-1)))
    seen = []
    multi_scale_maps(lambda x: (seen.append(tuple(x.shape[-2:])), x)[1], image, (0.5, 1.0, 1.25))
    assert seen == [(4, 4), (8, 8), (10, 10)]
    with pytest.raises(ValueError, match="scales"):
        multi_scale_maps(identity, image, ())
