"""Benchmarks: streams of tasks, in Avalanche's form."""

from .cifar100 import SplitCIFAR100
from .cub200 import SplitCUB200
from .digits import SplitDigits, digits_images
from .domains import DomainImageFolder
from .imagenet_r import SplitImageNetR
from .relations import (
    CALTECH101_GROUPS,
    TEXT_GROUPS,
    DomainDigits,
    GroupedImageFolder,
    GroupedTexts,
    ReturningTasks,
)
from .text_classes import TextClasses
from .text_classification import LongSequence, OLoRAOrder
from .text_tasks import TextTasks
from .trace import FULL_EPOCHS, LORA_EPOCHS, TRACE, TREELORA_EPOCHS, MathLLM
from .vision import SplitImageFolder

__all__ = [
    "CALTECH101_GROUPS",
    "FULL_EPOCHS",
    "LORA_EPOCHS",
    "TEXT_GROUPS",
    "TRACE",
    "TREELORA_EPOCHS",
    "DomainDigits",
    "DomainImageFolder",
    "GroupedImageFolder",
    "GroupedTexts",
    "LongSequence",
    "MathLLM",
    "OLoRAOrder",
    "ReturningTasks",
    "SplitCIFAR100",
    "SplitCUB200",
    "SplitDigits",
    "SplitImageFolder",
    "SplitImageNetR",
    "TextClasses",
    "TextTasks",
    "digits_images",
]
