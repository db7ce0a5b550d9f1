"""Reads folders of images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from treelora_avalanche.models.vision import ImagePreprocessing
from treelora_avalanche.scenarios.data.folders import (
    LAYOUTS,
    ImageRecord,
    choose_classes,
    class_folders,
    draw_split,
    images_of,
)


def list_images(
    root: Path, classes: Sequence[str] | None, test_fraction: float, seed: int | None
) -> tuple[list[ImageRecord], list[ImageRecord], list[str]]:
    """The training images, the test images and the class names."""
    if not root.is_dir():
        raise ValueError(f"`dataset_root` is {str(root)!r}, which is not a folder. {LAYOUTS}.")
    given = [part for part in ("train", "test") if (root / part).is_dir()]
    if len(given) == 2:
        train_names, test_names = (class_folders(root / part) for part in given)
        class_names = choose_classes(root, train_names, test_names, classes)
        train, test = (list(chain(*images_of(root / part, class_names))) for part in given)
        return train, test, class_names
    if given and next((root / given[0]).glob("*/"), None) is not None:
        missing = "test" if given == ["train"] else "train"
        raise ValueError(
            f"`dataset_root` {str(root)!r} has a folder {given[0]!r} with classes but none named "
            f"{missing!r}. {LAYOUTS}."
        )
    names = class_folders(root)
    class_names = choose_classes(root, names, names, classes)
    train, test = draw_split(images_of(root, class_names), class_names, test_fraction, seed)
    return train, test, class_names


class ImageFile(NamedTuple):
    """A file and what changes when it is written again."""

    path: str
    modified_ns: int
    size: int


def stamp(path: str) -> ImageFile:
    stat = os.stat(path)
    return ImageFile(os.path.abspath(path), stat.st_mtime_ns, stat.st_size)


def _read(path: str, preprocessing: ImagePreprocessing) -> Tensor:
    try:
        with Image.open(path) as image:
            return preprocessing.resize(image)
    # The many ways in which Pillow says that a file is broken.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(
            f"the image {path!r} cannot be read ({error}); replace or delete the file."
        ) from error


@lru_cache(maxsize=2)
def _decoded(files: tuple[ImageFile, ...], preprocessing: ImagePreprocessing) -> Tensor:
    """All images as bytes, ``(n, 3, height, width)``; seeds and methods share one copy."""
    return stacked(len(files), preprocessing, lambda row: _read(files[row].path, preprocessing))


def stacked(n: int, preprocessing: ImagePreprocessing, read: Callable[[int], Tensor]) -> Tensor:
    """``read(0)`` to ``read(n - 1)``, read by several threads, ``(n, 3, height, width)``."""
    images = torch.empty(n, *preprocessing.input_size, dtype=torch.uint8)

    def fill(row: int) -> None:
        images[row] = read(row)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow releases the GIL
        for _ in pool.map(fill, range(n)):
            pass
    return images


def fits(n: int, preprocessing: ImagePreprocessing, cache_bytes: int) -> bool:
    return n * math.prod(preprocessing.input_size) <= cache_bytes


def image_datasets(
    parts: Sequence[list[ImageRecord]], preprocessing: ImagePreprocessing, cache_bytes: int
) -> list[_Images]:
    """One dataset per list of images, all over one copy in memory if that fits."""
    paths = sorted({image.path for part in parts for image in part})
    images, row_of = None, {}
    if fits(len(paths), preprocessing, cache_bytes):
        images = _decoded(tuple(stamp(path) for path in paths), preprocessing)
        row_of = {path: row for row, path in enumerate(paths)}
    return [_Images(part, preprocessing, images, row_of) for part in parts]


class _Images(Dataset):
    """Resized images as uint8 tensors with their labels, from memory or from the files.

    :param samples: the images.
    :param preprocessing: how a file becomes a tensor.
    :param images: all images of the benchmark in memory, or None.
    :param row_of: where in ``images`` each path is.
    """

    def __init__(
        self,
        samples: list[ImageRecord],
        preprocessing: ImagePreprocessing,
        images: Tensor | None,
        row_of: dict[str, int],
    ) -> None:
        self.samples = samples
        self.targets = [sample.label for sample in samples]
        self.preprocessing = preprocessing
        self.images = images
        self.rows = [row_of[sample.path] for sample in samples] if images is not None else []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        if self.images is not None:
            return self.images[self.rows[index]], label
        return _read(path, self.preprocessing), label
