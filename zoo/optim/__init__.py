"""Optimization beyond one step downhill: what a method does with gradients besides handing them to its optimizer."""

from zoo.optim.sam import SAM
from zoo.optim.virtual import (
    Virtual,
    averaged_gradients,
    check_virtual,
    clipped_gradients,
    in_layout_of,
    kept_buffers,
    virtual_gradients,
    virtual_start,
    virtual_step,
    with_parameters,
)

__all__ = [
    "SAM",
    "Virtual",
    "averaged_gradients",
    "check_virtual",
    "clipped_gradients",
    "in_layout_of",
    "kept_buffers",
    "virtual_gradients",
    "virtual_start",
    "virtual_step",
    "with_parameters",
]
