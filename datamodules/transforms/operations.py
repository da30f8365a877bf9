"""Image operations on a whole batch, each sample with its own parameter.

Images are uint8 ``(B, C, H, W)`` with one or three channels; a parameter is a ``(B,)`` tensor on the images' device. No
operation loops over samples, waits for the device, or lets one sample see another.

Pointwise operations are tables of 256 grey levels per sample and channel, applied by one lookup; geometric ones are
inverse maps of pixel centres, applied by one nearest-pixel gather. Results are those of
``torchvision.transforms.v2.functional`` on uint8 tensors, at most one grey level apart where float rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _index_dtype(count: int) -> torch.dtype:
    """32-bit indices wherever they reach: half the memory traffic of 64-bit ones."""
    return torch.int32 if count < 2**31 else torch.int64


def _offsets(images: Tensor, step: int) -> Tensor:
    """Where each sample's and channel's run of ``step`` values begins in the flattened batch, (B, C, 1, 1)."""
    batch, channels = images.shape[:2]
    count = batch * channels
    starts = torch.arange(count, device=images.device, dtype=_index_dtype(max(count * step, images.numel()))) * step
    return starts.view(batch, channels, 1, 1)


def luminance(images: Tensor) -> Tensor:
    """Whole grey levels of a batch, (B, 1, H, W) float32: ``floor(0.2989 R + 0.587 G + 0.114 B)``."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _levels(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device, dtype=torch.float32).view(1, 1, 256)


def _expand(table: Tensor, images: Tensor) -> Tensor:
    return table.expand(images.shape[0], images.shape[1], 256)


# Tables: (images, values) -> (B, C, 256) uint8 ----------------------------------------------------------------------


def brightness_table(images: Tensor, factor: Tensor) -> Tensor:
    """``x · factor``: 0 is black, 1 is the image."""
    return _expand((_levels(images) * factor.view(-1, 1, 1)).clamp_(0, 255).to(torch.uint8), images)


def contrast_table(images: Tensor, factor: Tensor) -> Tensor:
    """``factor · x + (1 - factor) · mean grey``: 0 is plain grey, 1 is the image."""
    factor = factor.view(-1, 1, 1)
    mean = luminance(images).mean(dim=(1, 2, 3)).view(-1, 1, 1)
    return _expand((_levels(images) * factor + mean * (1.0 - factor)).clamp_(0, 255).to(torch.uint8), images)


def autocontrast_table(images: Tensor, values: Tensor) -> Tensor:
    """Stretch each channel's range to [0, 255]; a channel of one level stays as it is."""
    low = images.amin(dim=(2, 3)).float().unsqueeze(-1)
    high = images.amax(dim=(2, 3)).float().unsqueeze(-1)
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1.0 / 255))
    return ((_levels(images) - torch.where(flat, 0.0, low)) / scale).clamp_(0, 255).to(torch.uint8)


def equalize_table(images: Tensor, values: Tensor) -> Tensor:
    """Equalise each channel's histogram with Pillow's integer scheme; a channel of one level stays as it is."""
    batch, channels = images.shape[:2]
    runs = images.reshape(batch * channels, -1).long()
    histogram = torch.zeros(batch * channels, 256, dtype=torch.int32, device=images.device)
    histogram.scatter_add_(1, runs, torch.ones_like(runs, dtype=torch.int32))
    cumulative = histogram.cumsum(1, dtype=torch.int32)
    # the count of the brightest level present: the first place where the cumulative histogram is complete
    brightest = histogram.gather(1, cumulative.argmax(1, keepdim=True))
    step = torch.div(runs.shape[1] - brightest, 255, rounding_mode="floor")
    shifted = torch.cat([torch.zeros_like(step), cumulative[:, :-1]], dim=1)
    table = torch.div(shifted + torch.div(step, 2, rounding_mode="floor"), step.clamp(min=1), rounding_mode="floor")
    table[:, 0] = 0
    levels = torch.arange(256, device=images.device, dtype=table.dtype)
    return torch.where(step == 0, levels, table.clamp_(0, 255)).to(torch.uint8).view(batch, channels, 256)


def invert_table(images: Tensor, values: Tensor) -> Tensor:
    """``255 - x``."""
    return _expand((255 - _levels(images)).to(torch.uint8), images)


def posterize_table(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest ``floor(bits)`` bits, 0 to 8."""
    dropped = (8 - bits.to(torch.int32)).view(-1, 1, 1)
    levels = torch.arange(256, device=images.device, dtype=torch.int32).view(1, 1, 256)
    return _expand(((levels >> dropped) << dropped).to(torch.uint8), images)


def solarize_table(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert every level at or above ``floor(threshold)``."""
    levels = _levels(images)
    return _expand(
        torch.where(levels >= threshold.floor().view(-1, 1, 1), 255 - levels, levels).to(torch.uint8), images
    )


def apply_table(images: Tensor, table: Tensor) -> Tensor:
    """Look every pixel up in its own sample's and channel's (B, C, 256) table."""
    index = images.to(_index_dtype(table.numel())) + _offsets(images, 256)
    return table.reshape(-1).index_select(0, index.view(-1)).view(images.shape)


# Inverse maps: (images, values) -> (B, 2, 3) float32, output pixel centre -> input pixel centre, in pixels ----------


def _matrix(values: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    matrix = torch.zeros(values.shape[0], 2, 3, device=values.device)
    matrix[:, 0, 0] = 1.0
    matrix[:, 1, 1] = 1.0
    for (row, column), value in entries.items():
        matrix[:, row, column] = value
    return matrix


def rotate_matrix(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn by ``degrees`` around the centre, anticlockwise where positive."""
    height, width = images.shape[-2:]
    angle = torch.deg2rad(degrees.double())
    cosine, sine = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return _matrix(
        degrees,
        {
            (0, 0): cosine,
            (0, 1): -sine,
            (0, 2): x - cosine * x + sine * y,
            (1, 0): sine,
            (1, 1): cosine,
            (1, 2): y - sine * x - cosine * y,
        },
    )


def shear_x_matrix(images: Tensor, slope: Tensor) -> Tensor:
    """Slide each row by ``-slope`` pixels a row, the top left corner fixed: input x = x + slope · y."""
    return _matrix(slope, {(0, 1): slope})


def shear_y_matrix(images: Tensor, slope: Tensor) -> Tensor:
    """Slide each column by ``-slope`` pixels a column, the top left corner fixed: input y = y + slope · x."""
    return _matrix(slope, {(1, 0): slope})


def translate_x_matrix(images: Tensor, share: Tensor) -> Tensor:
    """Shift left by ``trunc(share · W)`` whole pixels; right where negative."""
    return _matrix(share, {(0, 2): (share * images.shape[-1]).trunc()})


def translate_y_matrix(images: Tensor, share: Tensor) -> Tensor:
    """Shift up by ``trunc(share · H)`` whole pixels; down where negative."""
    return _matrix(share, {(1, 2): (share * images.shape[-2]).trunc()})


def apply_matrix(images: Tensor, matrix: Tensor, fill: int = 0) -> Tensor:
    """Nearest-pixel gather through each sample's inverse map; ``fill`` where the map leaves the image."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=torch.float32).add_(0.5)
    y = torch.arange(height, device=images.device, dtype=torch.float32).add_(0.5)
    entries = matrix.view(-1, 6, 1, 1).unbind(1)
    from_x = ((entries[0] * x + entries[2]) + entries[1] * y.view(1, -1, 1)).floor_()
    from_y = ((entries[3] * x + entries[5]) + entries[4] * y.view(1, -1, 1)).floor_()
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    pixel = from_y.clamp_(0, height - 1).mul_(width).add_(from_x.clamp_(0, width - 1))
    offsets = _offsets(images, height * width)
    index = pixel.to(offsets.dtype).unsqueeze(1) + offsets
    moved = images.reshape(-1).index_select(0, index.view(-1)).view(images.shape)
    if fill == 0:
        return moved.mul_(inside.unsqueeze(1))
    return torch.where(inside.unsqueeze(1), moved, fill)


# Operations on neighbourhoods and channels: (images, values) -> images ----------------------------------------------


def color(images: Tensor, factor: Tensor) -> Tensor:
    """``factor · x + (1 - factor) · grey``: 0 is black and white, 1 is the image. One channel stays as it is."""
    if images.shape[1] == 1:
        return images
    factor = factor.view(-1, 1, 1, 1)
    return (images * factor).add_(luminance(images) * (1.0 - factor)).clamp_(0, 255).to(torch.uint8)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """``factor · x + (1 - factor) · smooth``, smooth = 3×3 mean with weight 5 in the middle; the border stays."""
    if images.shape[-1] <= 2 or images.shape[-2] <= 2:
        return images
    wide = images.to(torch.int16)
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    middle = wide[..., 1:-1, 1:-1]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * middle
    smooth = torch.div(total + 6, 13, rounding_mode="floor")  # 13 is odd: no ties to round
    blend = middle + (1.0 - factor.view(-1, 1, 1, 1)) * (smooth - middle)
    sharpened = images.clone()
    sharpened[..., 1:-1, 1:-1] = blend.clamp_(0, 255).to(torch.uint8)
    return sharpened


# Crops, flips and holes ---------------------------------------------------------------------------------------------


def shift_and_flip(images: Tensor, rows: Tensor, columns: Tensor, flip: Tensor, reflect: bool = True) -> Tensor:
    """Crop of the padded image at (rows, columns), then a mirror where ``flip``; padding is reflected or black.

    Args:
        images: uint8 (B, C, H, W).
        rows: whole rows that each crop lies below the image's top, (B,), negative above; below H in size.
        columns: whole columns that each crop lies right of the image's left edge, (B,); below W in size.
        flip: (B,) bool, mirror left to right.
        reflect: reflect at the border without repeating it; else pad with black.
    """
    height, width = images.shape[-2:]
    offsets = _offsets(images, height * width)
    y = torch.arange(height, device=images.device, dtype=offsets.dtype) + rows.to(offsets.dtype).view(-1, 1)
    x = torch.arange(width, device=images.device, dtype=offsets.dtype).expand(images.shape[0], -1)
    x = torch.where(flip.view(-1, 1), width - 1 - x, x) + columns.to(offsets.dtype).view(-1, 1)
    if reflect:
        y = (height - 1) - ((height - 1) - y.abs()).abs()
        x = (width - 1) - ((width - 1) - x.abs()).abs()
        inside = None
    else:
        inside = ((y >= 0) & (y < height)).unsqueeze(2) & ((x >= 0) & (x < width)).unsqueeze(1)
        y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    index = (y * width).view(-1, 1, height, 1) + x.view(-1, 1, 1, width) + offsets
    moved = images.reshape(-1).index_select(0, index.view(-1)).view(images.shape)
    return moved if inside is None else moved.mul_(inside.unsqueeze(1))


def cutout(images: Tensor, y: Tensor, x: Tensor, size: Tensor, fill: int = 127) -> Tensor:
    """Fill the square of ``size`` pixels around each centre (y, x); what leaves the image is lost.

    Args:
        images: uint8 (B, C, H, W).
        y: row of the centres, (B,) int; the square covers ``y - size // 2`` up to ``y - size // 2 + size - 1``.
        x: column of the centres, (B,) int.
        size: side of the squares, (B,) int; 0 leaves an image as it is.
        fill: grey level of the hole.
    """
    height, width = images.shape[-2:]
    below = torch.arange(height, device=images.device) - (y - size // 2).view(-1, 1)
    right = torch.arange(width, device=images.device) - (x - size // 2).view(-1, 1)
    in_rows = (below >= 0) & (below < size.view(-1, 1))
    in_columns = (right >= 0) & (right < size.view(-1, 1))
    hole = in_rows.view(-1, 1, height, 1) & in_columns.view(-1, 1, 1, width)
    return images.masked_fill(hole, fill)


Operation = Callable[[Tensor, Tensor], Tensor]

TABLES: dict[str, Operation] = {
    "autocontrast": autocontrast_table,
    "brightness": brightness_table,
    "contrast": contrast_table,
    "equalize": equalize_table,
    "invert": invert_table,
    "posterize": posterize_table,
    "solarize": solarize_table,
}
MATRICES: dict[str, Operation] = {
    "rotate": rotate_matrix,
    "shear_x": shear_x_matrix,
    "shear_y": shear_y_matrix,
    "translate_x": translate_x_matrix,
    "translate_y": translate_y_matrix,
}
OTHERS: dict[str, Operation] = {"color": color, "sharpness": sharpness}
OPERATIONS: tuple[str, ...] = ("identity", *OTHERS, *TABLES, *MATRICES)


def apply(name: str, images: Tensor, values: Tensor) -> Tensor:
    """One operation by name on a batch, each sample with its own value (ignored by the operations that have none)."""
    if name in TABLES:
        return apply_table(images, TABLES[name](images, values))
    if name in MATRICES:
        return apply_matrix(images, MATRICES[name](images, values))
    return OTHERS[name](images, values) if name in OTHERS else images
