"""Benchmarks: streams of tasks, in Avalanche's form."""

from .cifar100 import SplitCIFAR100
from .cub200 import SplitCUB200
from .digits import SplitDigits, digits_images
from .domains import DomainImageFolder
from .imagenet_r import SplitImageNetR
from .vision import SplitImageFolder

__all__ = [
    "DomainImageFolder",
    "SplitCIFAR100",
    "SplitCUB200",
    "SplitDigits",
    "SplitImageFolder",
    "SplitImageNetR",
    "digits_images",
]
