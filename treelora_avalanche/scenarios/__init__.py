"""Benchmarks: streams of tasks, in Avalanche's form."""

from .cifar100 import SplitCIFAR100
from .cub200 import SplitCUB200
from .digits import SplitDigits, digits_images
from .domains import DomainImageFolder
from .imagenet_r import SplitImageNetR
from .text_classification import LongSequence, OLoRAOrder
from .text_tasks import TextTasks
from .trace import FULL_EPOCHS, LORA_EPOCHS, TRACE, TREELORA_EPOCHS, MathLLM
from .vision import SplitImageFolder

__all__ = [
    "FULL_EPOCHS",
    "LORA_EPOCHS",
    "TRACE",
    "TREELORA_EPOCHS",
    "DomainImageFolder",
    "LongSequence",
    "MathLLM",
    "OLoRAOrder",
    "SplitCIFAR100",
    "SplitCUB200",
    "SplitDigits",
    "SplitImageFolder",
    "SplitImageNetR",
    "TextTasks",
    "digits_images",
]
