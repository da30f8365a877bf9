"""Elementwise affine layers."""

import torch
from torch import Tensor, nn


class Affines(nn.Module):
    r"""Elementwise affine layers :math:`w \odot x + b` with ReLU between; at first the identity of what is positive.

    Args:
        shape: of w and b, broadcast against that of a sample.
        depth: number of layers.
    """

    def __init__(self, shape: tuple[int, ...], depth: int) -> None:
        super().__init__()
        self.shape = shape
        self.weights = nn.ParameterList(torch.ones(shape) for _ in range(depth))
        self.biases = nn.ParameterList(torch.zeros(shape) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same."""
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = weight * (x.relu() if number else x) + bias
        return x
