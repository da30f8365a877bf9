"""Losses as pure functions: shapes and equations are in their docstrings."""

from zoo.losses.adversarial import domain_accuracy, domain_loss
from zoo.losses.annealing import annealed_cross_entropy, annealing_threshold, mean_of_kept
from zoo.losses.confidence import confidence_ramp, harden, soft_cross_entropy
from zoo.losses.coral import coral, covariance
from zoo.losses.cutmix import blend, boxes, cutmix
from zoo.losses.decoupled_mixup import (
    decoupled_binary_cross_entropy,
    decoupled_cross_entropy,
    decoupled_regularizer,
    decoupled_terms,
    mixed_targets,
    rescale,
)
from zoo.losses.dice import dice_loss, self_adjusting_dice_loss
from zoo.losses.distillation import distillation_loss
from zoo.losses.entropy import entropy
from zoo.losses.fairness import fairness_loss
from zoo.losses.focal import focal_loss
from zoo.losses.graph import graph_contrastive_loss, memory_smoothing, pseudo_label_graph
from zoo.losses.head_gradients import head_gradient_moments, head_gradient_norms, logit_gradients
from zoo.losses.inconsistency import gradient_size, gradient_variance_gap
from zoo.losses.logit_adjustment import adjust_logits
from zoo.losses.mixup import mix, mixing_shares, sharpen
from zoo.losses.mmd import Gaussian, joint_mmd, mmd
from zoo.losses.nearest_neighbors import nearest_neighbor_loss
from zoo.losses.rotation import quarter_turns
from zoo.losses.shrink import shrink_loss, shrunk_space
from zoo.losses.similarity import aggregate, inner_products, instance_similarity_loss, similarities, unfold
from zoo.losses.squared_error import squared_error
from zoo.losses.virtual_adversarial import divergence, virtual_adversarial_direction, virtual_adversarial_loss
from zoo.losses.weighted import weighted_mean
from zoo.losses.worst_case import worst_case_loss

__all__ = [
    "Gaussian",
    "adjust_logits",
    "aggregate",
    "annealed_cross_entropy",
    "annealing_threshold",
    "blend",
    "boxes",
    "confidence_ramp",
    "coral",
    "covariance",
    "cutmix",
    "decoupled_binary_cross_entropy",
    "decoupled_cross_entropy",
    "decoupled_regularizer",
    "decoupled_terms",
    "dice_loss",
    "distillation_loss",
    "divergence",
    "domain_accuracy",
    "domain_loss",
    "entropy",
    "fairness_loss",
    "focal_loss",
    "gradient_size",
    "gradient_variance_gap",
    "graph_contrastive_loss",
    "harden",
    "head_gradient_moments",
    "head_gradient_norms",
    "inner_products",
    "instance_similarity_loss",
    "joint_mmd",
    "logit_gradients",
    "mean_of_kept",
    "memory_smoothing",
    "mix",
    "mixed_targets",
    "mixing_shares",
    "mmd",
    "nearest_neighbor_loss",
    "pseudo_label_graph",
    "quarter_turns",
    "rescale",
    "self_adjusting_dice_loss",
    "sharpen",
    "shrink_loss",
    "shrunk_space",
    "similarities",
    "soft_cross_entropy",
    "squared_error",
    "unfold",
    "virtual_adversarial_direction",
    "virtual_adversarial_loss",
    "weighted_mean",
    "worst_case_loss",
]
