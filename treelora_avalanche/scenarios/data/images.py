"""Resized images as datasets, cached in memory if they fit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from treelora_avalanche.models.vision import ImagePreprocessing
from treelora_avalanche.scenarios.data.folders import ImageRecord


class FileStamp(NamedTuple):
    """A file with the properties that change when it is written again; a key of caches.

    :param path: absolute path.
    :param modified_ns: time of the last change.
    :param size: in bytes.
    """

    path: str
    modified_ns: int
    size: int


def file_stamp(path: str) -> FileStamp:
    """Returns the stamp of a file.

    :param path: the file.
    """
    stat = os.stat(path)
    return FileStamp(os.path.abspath(path), stat.st_mtime_ns, stat.st_size)


def read_image(path: str, preprocessing: ImagePreprocessing) -> Tensor:
    """Returns a resized image, uint8 ``(3, height, width)``.

    :param path: the file.
    :param preprocessing: how images are resized.
    :raises OSError: if Pillow cannot read the file.
    """
    try:
        with Image.open(path) as image:
            return preprocessing.resize(image)
    # The exceptions by which Pillow reports a broken file.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(
            f"the image {path!r} cannot be read ({error}); replace or delete the file."
        ) from error


@lru_cache(maxsize=2)
def _decoded(files: tuple[FileStamp, ...], preprocessing: ImagePreprocessing) -> Tensor:
    """Returns all images, uint8 ``(n, 3, height, width)``; seeds and methods share one copy."""
    return stack_images(
        len(files), preprocessing, lambda row: read_image(files[row].path, preprocessing)
    )


def stack_images(
    n: int, preprocessing: ImagePreprocessing, read: Callable[[int], Tensor]
) -> Tensor:
    """Returns ``read(0)`` to ``read(n - 1)``, read by several threads, ``(n, 3, height, width)``.

    :param n: number of images.
    :param preprocessing: gives their size.
    :param read: returns the image of a row.
    """
    images = torch.empty(n, *preprocessing.input_size, dtype=torch.uint8)

    def fill(row: int) -> None:
        images[row] = read(row)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow releases the GIL
        for _ in pool.map(fill, range(n)):
            pass
    return images


def fits_in_cache(n: int, preprocessing: ImagePreprocessing, cache_bytes: int) -> bool:
    """Returns whether ``n`` resized images, one byte per value, fit into ``cache_bytes``.

    :param n: number of images.
    :param preprocessing: gives their size.
    :param cache_bytes: the limit.
    """
    return n * math.prod(preprocessing.input_size) <= cache_bytes


def image_datasets(
    parts: Sequence[list[ImageRecord]], preprocessing: ImagePreprocessing, cache_bytes: int
) -> list[ResizedImages]:
    """Returns one dataset per list of images; all share one copy in memory if it fits.

    :param parts: lists of images, such as those for training and for testing.
    :param preprocessing: how images are resized.
    :param cache_bytes: limit of the copy in memory; files are read on access above it.
    :raises OSError: if an image cannot be read into the copy.
    """
    paths = sorted({image.path for part in parts for image in part})
    images, row_of = None, {}
    if fits_in_cache(len(paths), preprocessing, cache_bytes):
        images = _decoded(tuple(file_stamp(path) for path in paths), preprocessing)
        row_of = {path: row for row, path in enumerate(paths)}
    return [ResizedImages(part, preprocessing, images, row_of) for part in parts]


class ResizedImages(Dataset):
    """Resized images as uint8 tensors with their labels, from memory or from the files.

    Example::

        image, label = ResizedImages([ImageRecord("ant.png", 0)], ImagePreprocessing(), None, {})[0]

    :param samples: the images.
    :param preprocessing: how images are resized.
    :param images: all images of the benchmark in memory, or None.
    :param row_of: the row of each path in ``images``.
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
        return read_image(path, self.preprocessing), label
