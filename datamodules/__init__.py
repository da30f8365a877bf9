"""Data modules: what is labelled and how. Importing this names every regime, source and view, and reads no data."""

from datamodules.base import Data, find_source
from datamodules.domains import DomainData, GeneralizationData
from datamodules.held_out import HeldOutDomainData
from datamodules.label_shift import LabelShiftData
from datamodules.rounds import RoundsData
from datamodules.segmentation import SegmentationData
from datamodules.semi_supervised import SemiSupervisedData
from datamodules.sources import (
    CIFAR10,
    CIFAR100,
    STL10,
    SVHN,
    ArraySource,
    Blobs,
    FashionMNIST,
    FileList,
    ImageFolder,
    KnownClasses,
    MissingData,
    MNIST5k,
    Optdigits,
    Phrases,
    Sentiment,
    Source,
    TextTable,
)
from datamodules.sources.digit_scenes import DigitScenes
from datamodules.sources.voc import VOC
from datamodules.supervised import SupervisedData
from datamodules.weak_labels import WeakLabelData

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "SVHN",
    "VOC",
    "ArraySource",
    "Blobs",
    "Data",
    "DigitScenes",
    "DomainData",
    "FashionMNIST",
    "FileList",
    "GeneralizationData",
    "HeldOutDomainData",
    "ImageFolder",
    "KnownClasses",
    "LabelShiftData",
    "MNIST5k",
    "MissingData",
    "Optdigits",
    "Phrases",
    "RoundsData",
    "SegmentationData",
    "SemiSupervisedData",
    "Sentiment",
    "Source",
    "SupervisedData",
    "TextTable",
    "WeakLabelData",
    "find_source",
]
