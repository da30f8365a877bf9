"""Where samples come from. Importing this names every source and reads nothing."""

from datamodules.sources.arrays import ArraySource
from datamodules.sources.base import FileSamples, MissingData, Samples, Source, TensorSamples, TokenSamples
from datamodules.sources.blobs import Blobs
from datamodules.sources.colored import Colored
from datamodules.sources.digits import MNIST5k, Optdigits
from datamodules.sources.folders import FileList, ImageFolder
from datamodules.sources.known import KnownClasses
from datamodules.sources.merged import MergedClasses
from datamodules.sources.noisy import NoisyLabels
from datamodules.sources.phrases import Phrases
from datamodules.sources.rotated import Rotated
from datamodules.sources.sentiment import Sentiment
from datamodules.sources.sub_pseudo_labels import SubPseudoLabels
from datamodules.sources.text import TextSource, TextTable
from datamodules.sources.torchvision_sets import CIFAR10, CIFAR100, STL10, SVHN, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "SVHN",
    "ArraySource",
    "Blobs",
    "Colored",
    "FashionMNIST",
    "FileList",
    "FileSamples",
    "ImageFolder",
    "KnownClasses",
    "MNIST5k",
    "MergedClasses",
    "MissingData",
    "NoisyLabels",
    "Optdigits",
    "Phrases",
    "Rotated",
    "Samples",
    "Sentiment",
    "Source",
    "SubPseudoLabels",
    "TensorSamples",
    "TextSource",
    "TextTable",
    "TokenSamples",
]
