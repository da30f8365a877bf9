"""Losses as pure functions: shapes and equations are in their docstrings."""

from zoo.losses.adversarial import domain_accuracy, domain_loss
from zoo.losses.confidence import confidence_ramp, harden, soft_cross_entropy
from zoo.losses.distillation import distillation_loss

__all__ = [
    "confidence_ramp",
    "distillation_loss",
    "domain_accuracy",
    "domain_loss",
    "harden",
    "soft_cross_entropy",
]
