"""Pseudo-labels: from the logits of unlabeled samples to targets and weights."""

from zoo.policies.adaptive import SelfAdaptiveThreshold
from zoo.policies.alignment import Alignment, LabeledAlignment, MovingAlignment, QueueAlignment
from zoo.policies.dash import DynamicThreshold
from zoo.policies.debiased import DebiasedThreshold
from zoo.policies.flexible import FlexibleThreshold
from zoo.policies.policy import Policy
from zoo.policies.rebalanced import Rebalanced, TemperedAlignment
from zoo.policies.relative import RelativeThreshold
from zoo.policies.selection import (
    Balanced,
    ClassAdaptive,
    ConfidenceThreshold,
    Curriculum,
    Debiased,
    MeanVote,
    MostConfident,
    RandomSubset,
    Selection,
)
from zoo.policies.threshold import Threshold
from zoo.policies.transductive import TransductiveBound
from zoo.policies.truncated_gaussian import TruncatedGaussian

__all__ = [
    "Alignment",
    "Balanced",
    "ClassAdaptive",
    "ConfidenceThreshold",
    "Curriculum",
    "Debiased",
    "DebiasedThreshold",
    "DynamicThreshold",
    "FlexibleThreshold",
    "LabeledAlignment",
    "MeanVote",
    "MostConfident",
    "MovingAlignment",
    "Policy",
    "QueueAlignment",
    "RandomSubset",
    "Rebalanced",
    "RelativeThreshold",
    "Selection",
    "SelfAdaptiveThreshold",
    "TemperedAlignment",
    "Threshold",
    "TransductiveBound",
    "TruncatedGaussian",
]
