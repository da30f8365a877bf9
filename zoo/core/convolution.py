"""Convolutions of maps that are smaller than their kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_SAMPLES = 32  # fewer: oneDNN's convolution is as fast


class SmallMapConv2d(nn.Conv2d):
    r"""A convolution, computed as a matrix product where its kernel covers the whole map at every position.

    .. math:: y_o = b + \sum_i W_{i - o s + p}\, x_i, \qquad 0 \le i - o s + p < k \text{ for all } i \text{ and } o

    with positions i of the input and o of the output, stride s, padding p and kernel size k, in both directions. At the
    end of a network that was made for larger images a convolution mostly multiplies its padding: of the 36 products of
    a 3 × 3 kernel at 2 × 2 positions 20, at a single position 8 of 9. Here those are left out: on the CPU, while
    gradients are kept, for at least 32 samples, where that is more than rearranging the weights costs. Elsewhere this
    is an ordinary convolution. Both are the same up to rounding.

    It has the arguments, names and weights of :class:`torch.nn.Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name in the base class)
        """(B, C, H, W) to (B, D, H', W')."""
        if input.device.type != "cpu" or not torch.is_grad_enabled() or input.dim() != 4 or len(input) < _SAMPLES:
            return super().forward(input)
        if (taps := self.taps(input.shape[2], input.shape[3])) is None:
            return super().forward(input)
        rows, columns = taps
        which = rows[:, None, :, None] * self.kernel_size[1] + columns[None, :, None, :]  # (H', W', H, W)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1, 2)  # (D, k · k, C), nothing copied if channels are last
        weight = weight.index_select(1, which.flatten()).view(self.out_channels * len(rows) * len(columns), -1)
        bias = None if self.bias is None else self.bias.repeat_interleave(len(rows) * len(columns))
        output = linear(input.permute(0, 2, 3, 1).flatten(1), weight, bias)
        output = output.view(len(input), self.out_channels, len(rows), len(columns))
        last = input.is_contiguous(memory_format=torch.channels_last)
        return output.contiguous(memory_format=torch.channels_last) if last else output

    def taps(self, height: int, width: int) -> tuple[Tensor, Tensor] | None:
        """Which row and column of the kernel meets each output and input position, (H', H) and (W', W).

        ``None`` where some position is met by none, or where nothing would be saved.
        """
        kernel, stride = self.kernel_size, self.stride
        if height * width >= kernel[0] * kernel[1] or isinstance(self.padding, str) or self.padding_mode != "zeros":
            return None
        if self.groups != 1 or self.dilation != (1, 1):
            return None
        found = []
        for size, k, s, p in zip((height, width), kernel, stride, self.padding, strict=True):
            outputs = (size + 2 * p - k) // s + 1
            if outputs < 1 or size - 1 + p >= k or (outputs - 1) * s > p:
                return None
            found.append(torch.arange(size) - s * torch.arange(outputs)[:, None] + p)
        return found[0], found[1]


def spare_padding(module: nn.Module) -> None:
    """Make every plain convolution within ``module`` a :class:`SmallMapConv2d`, in place."""
    for part in module.modules():
        if type(part) is nn.Conv2d:
            part.__class__ = SmallMapConv2d
