"""Images turned by quarters, and by how many: a task that needs no labels."""

import torch
from torch import Tensor

from zoo.core.errors import UserError


def quarter_turns(images: Tensor) -> tuple[Tensor, Tensor]:
    r"""The first quarter of the batch as it is, the second turned by 90°, then 180° and 270°, counter-clockwise.

    Batches are shuffled, so that which image is turned how far is random; nothing has to be drawn.

    Args:
        images: (B, C, H, W) with H = W.

    Returns:
        Turned images (B, C, H, W), and the numbers of quarter turns (B,) in 0 to 3.

    Raises:
        UserError: for inputs that are not square images.

    Source: Gidaris et al. 2018, arXiv 1803.07728; in quarters as in ReMixMatch, arXiv 1911.09785.
    """
    if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
        raise UserError(f"quarter_turns: images of shape {tuple(images.shape)} are not square (B, C, H, W)")
    parts = images.tensor_split(4)
    turned = torch.cat([part.rot90(turns, dims=(-2, -1)) for turns, part in enumerate(parts)])
    turns = torch.arange(4).repeat_interleave(torch.tensor([len(part) for part in parts]))
    return turned, turns.to(images.device, non_blocking=True)
