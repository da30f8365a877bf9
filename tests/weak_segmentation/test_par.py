"""PAR against a double loop, and the properties that its equation promises."""

import math

import pytest
import torch
from torch.nn import functional as F

from zoo.weak_segmentation.par import pixel_adaptive_refinement, pixel_affinity


def brute_force_weights(image, dilations, position_weight=0.01, bandwidth=0.3):
    """The equations, pixel by pixel: (B, H, W) of lists of ((row, column), weight)."""
    count, channels, height, width = image.shape
    directions = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]
    steps = [(d * r, d * c) for d in dilations for r, c in directions]
    distances = [math.hypot(*step) for step in steps]
    mean = sum(distances) / len(distances)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in distances) / (len(distances) - 1))
    position = [math.exp(-((d / ((deviation + 1e-8) * bandwidth)) ** 2)) for d in distances]
    weights = {}
    for b in range(count):
        for y in range(height):
            for x in range(width):
                places = [(min(max(y + r, 0), height - 1), min(max(x + c, 0), width - 1)) for r, c in steps]
                energies = [0.0] * len(places)
                for channel in range(channels):
                    seen = [image[b, channel, r, c].item() for r, c in places]
                    centre = sum(seen) / len(seen)
                    sigma = math.sqrt(sum((v - centre) ** 2 for v in seen) / (len(seen) - 1))
                    here = image[b, channel, y, x].item()
                    for k, value in enumerate(seen):
                        energies[k] -= ((here - value) / ((sigma + 1e-8) * bandwidth)) ** 2 / channels
                colour = [math.exp(e) for e in energies]
                weights[b, y, x] = [
                    (place, c / sum(colour) + position_weight * p / sum(position))
                    for place, c, p in zip(places, colour, position, strict=True)
                ]
    return weights


@pytest.mark.parametrize("dilations", [(1,), (1, 2), (1, 3, 12)])
def test_equals_the_double_loop(dilations):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 7, 9, generator=generator, dtype=torch.float64)
    maps = torch.rand(1, 2, 7, 9, generator=generator, dtype=torch.float64)
    weights, expected = brute_force_weights(image, dilations), maps
    for _ in range(3):
        moved = torch.zeros_like(expected)
        for (b, y, x), neighbours in weights.items():
            for (r, c), weight in neighbours:
                moved[b, :, y, x] += weight * expected[b, :, r, c]
        expected = moved
    refined = pixel_adaptive_refinement(maps, image, dilations, iterations=3)
    torch.testing.assert_close(refined, expected, rtol=1e-10, atol=1e-12)


def test_weights_sum_to_one_and_the_position_weight():
    image = torch.rand(2, 3, 8, 6, dtype=torch.float64)
    total = pixel_affinity(image, (1, 2, 4)).sum(1)
    torch.testing.assert_close(total, torch.full_like(total, 1.01))
    constant = torch.full((2, 1, 8, 6), 0.5, dtype=torch.float64)
    grown = pixel_adaptive_refinement(constant, image, (1, 2, 4), iterations=10)
    torch.testing.assert_close(grown, constant * 1.01**10)


def test_mirrored_input_gives_mirrored_output():
    image, maps = torch.rand(2, 3, 9, 12, dtype=torch.float64), torch.rand(2, 2, 9, 12, dtype=torch.float64)
    refined = pixel_adaptive_refinement(maps, image, (1, 2), 4)
    for axis in (-1, -2):
        mirrored = pixel_adaptive_refinement(maps.flip(axis), image.flip(axis), (1, 2), 4)
        torch.testing.assert_close(mirrored, refined.flip(axis))


def test_channels_may_be_permuted_and_intensities_scaled():
    image, maps = torch.rand(1, 3, 6, 6, dtype=torch.float64), torch.rand(1, 2, 6, 6, dtype=torch.float64)
    refined = pixel_adaptive_refinement(maps, image, (1, 2), 3)
    torch.testing.assert_close(pixel_adaptive_refinement(maps, image[:, [2, 0, 1]], (1, 2), 3), refined)
    # the normalised image serves as well as the original
    scaled = (image - 0.5) / torch.tensor([0.2, 0.25, 0.3], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(pixel_adaptive_refinement(maps, scaled, (1, 2), 3), refined, rtol=1e-5, atol=1e-6)


def test_a_flat_image_spreads_evenly_without_nan():
    weights = pixel_affinity(torch.full((1, 3, 5, 5), 0.3), (1, 2))
    position = pixel_affinity(torch.full((1, 3, 5, 5), 0.3), (1, 2), position_weight=0.0)
    assert weights.isfinite().all()
    torch.testing.assert_close(position, torch.full_like(position, 1 / 16))


def test_a_score_stays_within_its_colour():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    image[..., 4:] = 1
    maps = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    maps[..., 3, 1] = 1
    refined = pixel_adaptive_refinement(maps, image, (1, 2), 6)
    assert refined[..., :4].sum() > 100 * refined[..., 4:].sum() > 0


def test_absent_planes_cost_nothing_and_change_nothing():
    image, maps = torch.rand(3, 3, 6, 7), torch.rand(3, 4, 6, 7)
    present = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    refined = pixel_adaptive_refinement(maps, image, (1, 2), 3, present=present)
    everything = pixel_adaptive_refinement(maps, image, (1, 2), 3)
    torch.testing.assert_close(refined, everything * present[:, :, None, None])
    none = pixel_adaptive_refinement(maps, image, (1, 2), 3, present=torch.zeros(3, 4))
    assert none.shape == maps.shape
    assert none.abs().sum() == 0


def test_small_maps_are_resized_and_zero_iterations_change_nothing():
    image, maps = torch.rand(1, 3, 8, 8), torch.rand(1, 2, 4, 4)
    expected = F.interpolate(maps, (8, 8), mode="bilinear", align_corners=True)
    torch.testing.assert_close(pixel_adaptive_refinement(maps, image, (1,), 0), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iterations": -1}, "iterations=-1"),
        ({"dilations": ()}, "dilations=()"),
        ({"dilations": (0, 2)}, "dilations=(0, 2)"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError) as error:
        pixel_adaptive_refinement(torch.rand(1, 1, 4, 4), torch.rand(1, 3, 4, 4), **arguments)
    assert message in str(error.value)


def test_refuses_maps_of_other_images():
    with pytest.raises(ValueError, match="2 maps for 1 images"):
        pixel_adaptive_refinement(torch.rand(2, 1, 4, 4), torch.rand(1, 3, 4, 4))
