"""Segmentation from image tags: class activation maps, refinement, pseudo-labels."""

from zoo.weak_segmentation.cam import CAM
from zoo.weak_segmentation.maps import class_activation_maps, multi_scale_maps, normalize_maps, pseudo_labels
from zoo.weak_segmentation.par import pixel_adaptive_refinement, pixel_affinity

__all__ = [
    "CAM",
    "class_activation_maps",
    "multi_scale_maps",
    "normalize_maps",
    "pixel_adaptive_refinement",
    "pixel_affinity",
    "pseudo_labels",
]
