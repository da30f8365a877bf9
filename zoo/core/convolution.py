"""Convolutions of maps that are hardly larger than their kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SAMPLES = 8  # fewer: the convolution is as fast
_WEIGHTS = 2**17  # channels in times channels out; fewer: the convolution is faster
_SHARE = 0.7  # of the products, those that are not with padding; more: nothing is won


class SmallMapConv2d(nn.Conv2d):
    r"""A convolution that does not multiply its padding where the map is small.

    .. math:: y_o = b + \sum_{i:\; 0 \le i - o s + p < k} W_{i - o s + p}\, x_i

    with positions i of the input and o of the output, stride s, padding p and kernel size k, in both directions. At the
    end of a network that was made for larger images a convolution mostly multiplies padding: of the 36 products of a
    3 × 3 kernel at 2 × 2 positions 20, at a single position 8 of 9; and where there are few positions and many
    channels, rearranging the weights takes longer than multiplying by them. Here every place of the kernel is one
    matrix product with those positions that it meets: on the CPU, while gradients are kept, for at least 8 samples, and
    where no more than 0.7 of the products are left and the layer is wide. Elsewhere this is an ordinary convolution.
    Both are the same up to rounding.

    It has the arguments, names and weights of :class:`torch.nn.Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name in the base class)
        """(B, C, H, W) to (B, D, H', W')."""
        if (meets := self.meets(input)) is None:
            return super().forward(input)
        weight = self.weight.contiguous(memory_format=torch.channels_last).permute(2, 3, 0, 1).flatten(0, 1)
        x = input.permute(2, 3, 0, 1).flatten(0, 1)  # (H · W, B, C), and weights (k · k, D, C)
        if torch.is_autocast_enabled("cpu"):
            x, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight))
        sources, targets = (torch.tensor(which) for which in (meets.inputs, meets.outputs))
        y = _Products.apply(x, weight, sources, targets, meets.counts, meets.rows * meets.columns)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        y = y.unflatten(0, (meets.rows, meets.columns)).permute(2, 3, 0, 1)
        last = input.is_contiguous(memory_format=torch.channels_last)
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def meets(self, input: Tensor) -> Meets | None:  # noqa: A002
        """Where kernel and map meet; ``None`` where the ordinary convolution is to be taken."""
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if not plain or isinstance(self.padding, str) or self.in_channels * self.out_channels < _WEIGHTS:
            return None
        if input.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if input.dim() != 4 or len(input) < _SAMPLES or max(input.shape[2:]) > 8:
            return None
        found = meets(input.shape[2], input.shape[3], self.kernel_size, self.stride, self.padding)  # type: ignore[arg-type]
        products = found.rows * found.columns * self.kernel_size[0] * self.kernel_size[1]
        return found if 0 < len(found.inputs) <= _SHARE * products else None


class Meets(NamedTuple):
    """The pairs of input and output positions that a kernel joins, in the order of the kernel's places.

    Attributes:
        inputs: number of the input position of each pair, row by row.
        outputs: number of its output position.
        counts: pairs of every place of the kernel.
        rows: H' of the output.
        columns: W' of the output.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    counts: tuple[int, ...]
    rows: int
    columns: int


@lru_cache(256)
def meets(height: int, width: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Meets:
    """Which positions of a map meet which place of a kernel."""

    def along(size: int, k: int, s: int, p: int) -> tuple[int, list[tuple[int, int, int]]]:
        outputs = max((size + 2 * p - k) // s + 1, 0)
        return outputs, [(i - o * s + p, i, o) for o in range(outputs) for i in range(size) if 0 <= i - o * s + p < k]

    rows, vertical = along(height, kernel[0], stride[0], padding[0])
    columns, horizontal = along(width, kernel[1], stride[1], padding[1])
    pairs = sorted(
        (a * kernel[1] + b, i * width + j, o * columns + q) for a, i, o in vertical for b, j, q in horizontal
    )
    counts = [0] * (kernel[0] * kernel[1])
    for place, _, _ in pairs:
        counts[place] += 1
    return Meets(tuple(i for _, i, _ in pairs), tuple(o for _, _, o in pairs), tuple(counts), rows, columns)


class _Products(torch.autograd.Function):
    """Maps (I, B, C) to (O, B, D) by weights (K, D, C); what autograd would do makes all weights' gradient K times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, sources: Tensor, targets: Tensor, counts: Sequence[int], outputs: int
    ) -> Tensor:
        return _carried(x, weight.mT, sources, targets, counts, outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.counts, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, sources, targets = ctx.saved_tensors
        counts, (gradient,) = ctx.counts, gradients
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _carried(gradient, weight, targets, sources, counts, len(x))
        if ctx.needs_input_grad[1]:
            given = [part.flatten(0, 1).T for part in gradient.index_select(0, targets).split(counts)]
            taken = [part.flatten(0, 1) for part in x.index_select(0, sources).split(counts)]
            if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
                of_weight = torch.stack([a @ b for a, b in zip(given, taken, strict=True)])
            else:
                of_weight = torch.empty_like(weight)  # in the layout of the parameter
                for part, a, b in zip(of_weight, given, taken, strict=True):
                    torch.mm(a, b, out=part)
        return of_x, of_weight, None, None, None, None


def _carried(
    x: Tensor, weight: Tensor, sources: Tensor, targets: Tensor, counts: Sequence[int], outputs: int
) -> Tensor:
    """Positions (I, B, C) by matrices (K, C, D), summed where they arrive: (O, B, D)."""
    parts = zip(x.index_select(0, sources).split(counts), weight.unbind(0), strict=True)
    sent = torch.cat([part.flatten(0, 1) @ matrix for part, matrix in parts]).view(len(sources), x.shape[1], -1)
    total = sent.float() if sent.element_size() < 4 else sent
    return total.new_zeros(outputs, *sent.shape[1:]).index_add(0, targets, total).to(sent.dtype)


def spare_padding(module: nn.Module) -> None:
    """Make every plain convolution within ``module`` a :class:`SmallMapConv2d`, in place."""
    for part in module.modules():
        if type(part) is nn.Conv2d:
            part.__class__ = SmallMapConv2d
