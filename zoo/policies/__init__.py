"""Pseudo-labels: from the logits of unlabeled samples to targets and weights."""

from zoo.policies.alignment import Alignment, MovingAlignment
from zoo.policies.threshold import Policy, Threshold

__all__ = ["Alignment", "MovingAlignment", "Policy", "Threshold"]
