"""Pseudo-labels: from the logits of unlabeled samples to targets and weights."""

from zoo.policies.alignment import Alignment, MovingAlignment
from zoo.policies.policy import Policy
from zoo.policies.threshold import Threshold

__all__ = ["Alignment", "MovingAlignment", "Policy", "Threshold"]
