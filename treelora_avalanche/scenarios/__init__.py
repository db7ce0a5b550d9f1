"""Benchmark generators: streams of experiences as Avalanche benchmarks."""

from treelora_avalanche.scenarios.cifar100 import SplitCIFAR100
from treelora_avalanche.scenarios.cub200 import SplitCUB200
from treelora_avalanche.scenarios.digits import SplitDigits, digits_images
from treelora_avalanche.scenarios.domains import DomainImageFolder
from treelora_avalanche.scenarios.image_folder import SplitImageFolder
from treelora_avalanche.scenarios.image_tasks import ImageTasks
from treelora_avalanche.scenarios.imagenet_r import SplitImageNetR
from treelora_avalanche.scenarios.o_lora import LongSequence, OLoRAOrder
from treelora_avalanche.scenarios.related_tasks import (
    CALTECH101_GROUPS,
    TEXT_GROUPS,
    DomainDigits,
    GroupedImageFolder,
    GroupedTexts,
    ReturningTasks,
)
from treelora_avalanche.scenarios.text_classes import TextClasses
from treelora_avalanche.scenarios.text_tasks import TextTasks
from treelora_avalanche.scenarios.tiny_texts import TINY_TASKS, TinyTexts
from treelora_avalanche.scenarios.trace import (
    FULL_EPOCHS,
    LORA_EPOCHS,
    TRACE,
    TREELORA_EPOCHS,
    MathLLM,
)
from treelora_avalanche.scenarios.validation import validation_benchmark

__all__ = [
    "CALTECH101_GROUPS",
    "FULL_EPOCHS",
    "LORA_EPOCHS",
    "TEXT_GROUPS",
    "TINY_TASKS",
    "TRACE",
    "TREELORA_EPOCHS",
    "DomainDigits",
    "DomainImageFolder",
    "GroupedImageFolder",
    "GroupedTexts",
    "ImageTasks",
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
    "TinyTexts",
    "digits_images",
    "validation_benchmark",
]
