"""Streams whose relations between tasks are known, each with its pretrained model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from _command import required_path
from torch import nn

from treelora_avalanche.models import create_vit, image_preprocessing, pretrained_digits_vit
from treelora_avalanche.scenarios import (
    CALTECH101_GROUPS,
    DomainDigits,
    DomainImageFolder,
    GroupedImageFolder,
    ReturningTasks,
    SplitDigits,
)

WEIGHTS = "deit_tiny_patch16_224_in1k/model.fp16.safetensors"


class Stream(NamedTuple):
    """A benchmark, the group of every task, and a function that makes the model."""

    benchmark: Any
    groups: list[str]
    model: Callable[[], nn.Module]


def deit_tiny(data: Path, num_classes: int) -> Callable[[], nn.Module]:
    """Returns a function that makes DeiT-Tiny with ImageNet weights, at 112 pixels.

    :param data: the folder that contains the weights.
    :param num_classes: outputs of the head.
    """
    return partial(
        create_vit,
        "deit_tiny_patch16_224",
        num_classes=num_classes,
        checkpoint=required_path(data, WEIGHTS),
        img_size=112,
    )


def _digits(benchmark: Any) -> Stream:
    """Returns a stream on the small transformer of digits."""
    groups = getattr(benchmark, "groups", None) or [
        str(i) for i in range(len(benchmark.train_stream))
    ]
    return Stream(benchmark, groups, partial(pretrained_digits_vit, 0))


def _images(name: str, num_classes: int, make: Callable[..., Any], data: Path) -> Stream:
    """Returns a stream on DeiT-Tiny."""
    folder, model = required_path(data, name), deit_tiny(data, num_classes)
    benchmark = make(folder, preprocessing=image_preprocessing(model()))
    return Stream(benchmark, benchmark.groups, model)


def _pacs(root: Path, preprocessing: Any, seed: int) -> Any:
    """Returns the domains of PACS, each twice."""
    once = DomainImageFolder(root, preprocessing=preprocessing, seed=seed)
    return ReturningTasks(once, 2, seed=seed)


STREAMS: dict[str, Callable[[Path, int], Stream]] = {
    "domains": lambda _, seed: _digits(ReturningTasks(DomainDigits(seed=seed), 2, seed=seed)),
    "returning": lambda _, seed: _digits(
        ReturningTasks(DomainDigits(seed=seed), 2, order="rounds", seed=seed)
    ),
    "pairs": lambda _, seed: _digits(ReturningTasks(SplitDigits(5, seed=seed), 2, seed=seed)),
    "unrelated": lambda _, seed: _digits(SplitDigits(5, seed=seed)),
    "pacs": lambda data, seed: _images("pacs", 7, partial(_pacs, seed=seed), data),
    "caltech101": lambda data, seed: _images(
        "caltech101", 28, partial(GroupedImageFolder, groups=CALTECH101_GROUPS, seed=seed), data
    ),
}
"""By name: the stream from the data folder and the seed of its order."""
