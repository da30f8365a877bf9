"""Where samples come from. Importing this names every source and reads nothing."""

from datamodules.sources.arrays import ArraySource
from datamodules.sources.base import FileSamples, MissingData, Samples, Source, TensorSamples, TokenSamples
from datamodules.sources.blobs import Blobs
from datamodules.sources.candidates import CandidateSource, CandidateTable, SimulatedCandidates
from datamodules.sources.captions import CaptionTable, TemplateCaptions
from datamodules.sources.colored import Colored
from datamodules.sources.digit_scenes import DigitScenes
from datamodules.sources.digit_sorting import DigitSorting
from datamodules.sources.digits import MNIST5k, Optdigits
from datamodules.sources.domain_files import DomainFolders, DomainLists
from datamodules.sources.domain_sets import (
    PACS,
    VLCS,
    DomainNet,
    DomainNet126,
    Office31,
    OfficeHome,
    TerraIncognita,
    VisDA2017,
)
from datamodules.sources.folders import FileList, ImageFolder
from datamodules.sources.known import KnownClasses
from datamodules.sources.merged import MergedClasses
from datamodules.sources.mnist_m import MNISTM, BlendedDigits
from datamodules.sources.noisy import NoisyLabels
from datamodules.sources.pairs import PairSource, PreferenceTable
from datamodules.sources.phrases import Phrases
from datamodules.sources.rotated import Rotated
from datamodules.sources.sentiment import Sentiment
from datamodules.sources.sub_pseudo_labels import SubPseudoLabels
from datamodules.sources.text import TextSource, TextTable
from datamodules.sources.text_candidates import TextCandidates
from datamodules.sources.torchvision_sets import CIFAR10, CIFAR100, MNIST, STL10, SVHN, USPS, FashionMNIST
from datamodules.sources.voc import VOC
from datamodules.sources.wilds import WILDS

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "MNISTM",
    "PACS",
    "STL10",
    "SVHN",
    "USPS",
    "VLCS",
    "VOC",
    "WILDS",
    "ArraySource",
    "BlendedDigits",
    "Blobs",
    "CandidateSource",
    "CandidateTable",
    "CaptionTable",
    "Colored",
    "DigitScenes",
    "DigitSorting",
    "DomainFolders",
    "DomainLists",
    "DomainNet",
    "DomainNet126",
    "FashionMNIST",
    "FileList",
    "FileSamples",
    "ImageFolder",
    "KnownClasses",
    "MNIST5k",
    "MergedClasses",
    "MissingData",
    "NoisyLabels",
    "Office31",
    "OfficeHome",
    "Optdigits",
    "PairSource",
    "Phrases",
    "PreferenceTable",
    "Rotated",
    "Samples",
    "Sentiment",
    "SimulatedCandidates",
    "Source",
    "SubPseudoLabels",
    "TemplateCaptions",
    "TensorSamples",
    "TerraIncognita",
    "TextCandidates",
    "TextSource",
    "TextTable",
    "TokenSamples",
    "VisDA2017",
]
