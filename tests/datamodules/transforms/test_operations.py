"""Every batched operation against torchvision on each image alone."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional

from datamodules.transforms import operations

# name -> parameters that include the ends of FixMatch's ranges and both signs
VALUES = {
    "identity": [0.0, 0.0],
    "autocontrast": [0.0, 0.0],
    "equalize": [0.0, 0.0],
    "invert": [0.0, 0.0],
    "brightness": [0.05, 0.31, 0.95, 1.7],
    "contrast": [0.05, 0.31, 0.95, 1.7],
    "color": [0.05, 0.31, 0.95, 1.7],
    "sharpness": [0.05, 0.31, 0.95, 1.7],
    "posterize": [4.0, 5.7, 6.0, 7.99, 8.0],
    "solarize": [0.0, 17.3, 128.0, 255.0, 256.0],
    "rotate": [0.0, 29.9, -29.9, 7.3, -12.9, 61.7],  # sin 30° = 1/2 puts pixels on ties, rounded either way
    "shear_x": [0.3, -0.3, 0.113, -0.27],
    "shear_y": [0.3, -0.3, 0.113, -0.27],
    "translate_x": [0.3, -0.3, 0.1, -0.01],
    "translate_y": [0.3, -0.3, 0.1, -0.01],
}
# float rounding may differ by a grey level only where a product of two floats is truncated
EXACT = set(VALUES) - {"contrast", "color", "sharpness"}


def by_torchvision(name, image, value):
    height, width = image.shape[-2:]
    degrees = math.degrees(math.atan(value))
    return {
        "identity": lambda: image,
        "autocontrast": lambda: functional.autocontrast(image),
        "equalize": lambda: functional.equalize(image),
        "invert": lambda: functional.invert(image),
        "brightness": lambda: functional.adjust_brightness(image, value),
        "contrast": lambda: functional.adjust_contrast(image, value),
        "color": lambda: functional.adjust_saturation(image, value),
        "sharpness": lambda: functional.adjust_sharpness(image, value),
        "posterize": lambda: functional.posterize(image, int(value)),
        "solarize": lambda: functional.solarize(image, int(value)) if value < 256 else image,
        "rotate": lambda: functional.rotate(image, value),
        "shear_x": lambda: functional.affine(image, 0.0, [0, 0], 1.0, [degrees, 0.0], center=[0, 0]),
        "shear_y": lambda: functional.affine(image, 0.0, [0, 0], 1.0, [0.0, degrees], center=[0, 0]),
        "translate_x": lambda: functional.affine(image, 0.0, [-int(value * width), 0], 1.0, [0.0, 0.0]),
        "translate_y": lambda: functional.affine(image, 0.0, [0, -int(value * height)], 1.0, [0.0, 0.0]),
    }[name]()


def pictures(count, channels, height, width):
    """Smooth, noisy, narrow-ranged and flat images, so that tables and statistics have something to do."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, channels, height, width), generator=generator)
    ramp = torch.linspace(0, 255, height * width).view(1, 1, height, width).expand_as(noise)
    images = torch.where(torch.arange(count).view(-1, 1, 1, 1) % 2 == 0, noise, (ramp + noise // 16).clamp(0, 255))
    if count > 2:
        images[1] = images[1] // 4 + 60
        images[2] = 93
    return images.to(torch.uint8)


def test_every_operation_has_values():
    assert set(VALUES) == set(operations.OPERATIONS)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 20, 33), (1, 9, 5)])
@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_equals_torchvision(name, shape):
    values = torch.tensor(VALUES[name] * 3)
    images = pictures(len(values), *shape)
    expected = torch.stack(
        [by_torchvision(name, image, value) for image, value in zip(images, values.tolist(), strict=True)]
    )
    before = images.clone()
    actual = operations.apply(name, images, values)
    assert actual.dtype == torch.uint8
    assert torch.equal(images, before)
    difference = (actual.int() - expected.int()).abs()
    if name in EXACT:
        assert difference.max() == 0
    else:
        assert difference.max() <= 1
        assert difference.float().mean() < 0.02


@pytest.mark.parametrize("name", sorted(set(VALUES) - {"identity"}))
def test_moves_something(name):
    images = pictures(1, 3, 16, 16)
    value = torch.tensor([VALUES[name][1]])
    assert not torch.equal(operations.apply(name, images, value), images)


@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_no_sample_touches_another(name):
    values = torch.tensor(VALUES[name] * 2)
    images = pictures(len(values), 3, 12, 14)
    together = operations.apply(name, images, values)
    alone = torch.cat([operations.apply(name, images[i : i + 1], values[i : i + 1]) for i in range(len(values))])
    assert torch.equal(together, alone)


def test_hand_numbers():
    image = torch.tensor([[[[0, 10], [100, 200]]]], dtype=torch.uint8)

    def run(name, value):
        return operations.apply(name, image, torch.tensor([value])).flatten().tolist()

    assert run("brightness", 0.5) == [0, 5, 50, 100]
    assert run("contrast", 0.0) == [77] * 4  # the mean, 77.5, truncated
    assert run("solarize", 100.0) == [0, 10, 155, 55]
    assert run("posterize", 2.0) == [0, 0, 64, 192]
    assert run("autocontrast", 0.0) == [0, 12, 127, 254]  # 200 / float32(200 / 255) falls short of 255, as there
    assert run("translate_x", 0.5) == [10, 0, 200, 0]
    assert run("translate_y", -0.5) == [0, 0, 0, 10]
    assert run("rotate", 90.0) == [10, 200, 0, 100]  # anticlockwise


def test_shear_fixes_the_corner():
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    sheared = operations.apply("shear_x", image, torch.tensor([1.0]))
    # pixel centres: row r comes from x + (r + 1/2), so floor(x + 1/2 + r + 1/2) = x + r + 1
    assert sheared[0, 0].tolist() == [[2, 3, 4, 0], [7, 8, 0, 0], [12, 0, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(operations.apply("shear_y", image.mT, torch.tensor([1.0])), sheared.mT)


def test_fill_comes_in_at_the_border():
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    moved = operations.apply_matrix(image, operations.translate_x_matrix(image, torch.tensor([0.25])), fill=9)
    assert moved[0, 0].tolist() == [[0, 0, 0, 9]] * 4


@pytest.mark.parametrize("reflect", [True, False])
def test_crops_are_crops_of_the_padded_image(reflect):
    images = pictures(6, 3, 10, 8)
    rows, columns = torch.tensor([-3, 0, 3, 1, -2, 2]), torch.tensor([0, -3, 3, 2, -1, 1])
    flip = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.bool)
    actual = operations.shift_and_flip(images, rows, columns, flip, reflect)
    for i in range(6):
        padded = functional.pad(images[i], [3, 3, 3, 3], padding_mode="reflect" if reflect else "constant")
        crop = padded[:, 3 + rows[i] : 13 + rows[i], 3 + columns[i] : 11 + columns[i]]
        assert torch.equal(actual[i], crop.flip(-1) if flip[i] else crop)


def test_cutout_area():
    images = torch.full((4, 3, 12, 12), 200, dtype=torch.uint8)
    y, x = torch.tensor([6, 0, 11, 5]), torch.tensor([6, 0, 5, 5])
    holes = operations.cutout(images, y, x, torch.tensor([6, 6, 6, 0]), fill=7) == 7
    # inside: the whole square; in a corner: a quarter; rows 8 to 11 at the lower border: 4 of 6 rows
    assert holes.flatten(2).sum(2).tolist() == [[36] * 3, [9] * 3, [24] * 3, [0] * 3]
    assert holes[0, 0, 3:9, 3:9].all()
    assert (holes[:, 0] == holes[:, 2]).all()


def test_sharpness_leaves_tiny_images():
    images = pictures(2, 3, 2, 5)
    assert torch.equal(operations.sharpness(images, torch.tensor([0.1, 0.2])), images)
