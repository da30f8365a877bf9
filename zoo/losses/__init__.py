"""Losses as pure functions: shapes and equations are in their docstrings."""

from zoo.losses.adversarial import domain_accuracy, domain_loss
from zoo.losses.confidence import confidence_ramp, harden, soft_cross_entropy
from zoo.losses.cutmix import blend, boxes, cutmix
from zoo.losses.decoupled_mixup import (
    decoupled_binary_cross_entropy,
    decoupled_cross_entropy,
    decoupled_regularizer,
    decoupled_terms,
    mixed_targets,
    rescale,
)
from zoo.losses.distillation import distillation_loss
from zoo.losses.entropy import entropy
from zoo.losses.mixup import mix, mixing_shares, sharpen
from zoo.losses.rotation import quarter_turns
from zoo.losses.shrink import shrink_loss, shrunk_space
from zoo.losses.squared_error import squared_error
from zoo.losses.virtual_adversarial import divergence, virtual_adversarial_direction, virtual_adversarial_loss
from zoo.losses.worst_case import worst_case_loss

__all__ = [
    "blend",
    "boxes",
    "confidence_ramp",
    "cutmix",
    "decoupled_binary_cross_entropy",
    "decoupled_cross_entropy",
    "decoupled_regularizer",
    "decoupled_terms",
    "distillation_loss",
    "divergence",
    "domain_accuracy",
    "domain_loss",
    "entropy",
    "harden",
    "mix",
    "mixed_targets",
    "mixing_shares",
    "quarter_turns",
    "rescale",
    "sharpen",
    "shrink_loss",
    "shrunk_space",
    "soft_cross_entropy",
    "squared_error",
    "virtual_adversarial_direction",
    "virtual_adversarial_loss",
    "worst_case_loss",
]
