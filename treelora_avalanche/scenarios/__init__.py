"""Benchmarks: streams of tasks, in Avalanche's form."""

from .digits import SplitDigits, digits_images
from .vision import SplitImageFolder

__all__ = ["SplitDigits", "SplitImageFolder", "digits_images"]
