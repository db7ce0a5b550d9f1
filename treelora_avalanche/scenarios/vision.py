"""Class-incremental benchmarks of images: any folder of classes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from avalanche.benchmarks import NCScenario
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from treelora_avalanche.models.vision import ImagePreprocessing
from treelora_avalanche.scenarios.by_class import split_by_class
from treelora_avalanche.scenarios.folders import (
    LAYOUTS,
    _choose_classes,
    _class_folders,
    _draw_split,
    _Image,
    _images_of,
)


def SplitImageFolder(
    dataset_root: str | Path,
    n_experiences: int = 10,
    *,
    preprocessing: ImagePreprocessing | None = None,
    train_transform: Callable[[Tensor], Any] | None = None,
    eval_transform: Callable[[Tensor], Any] | None = None,
    classes: Sequence[str] | None = None,
    fixed_class_order: Sequence[int] | None = None,
    seed: int | None = None,
    shuffle: bool = True,
    test_fraction: float = 0.2,
    cache_bytes: int = 2 * 1024**3,
    return_task_id: bool = False,
) -> NCScenario:
    """A folder of images, one subfolder per class, as a class-incremental benchmark.

    Two layouts are accepted: ``root/train/<class>/*`` with ``root/test/<class>/*``, a given split;
    and ``root/<class>/*``, of which a stratified test set is drawn. Files that are not images are
    ignored, images of any mode are read as RGB.

    :param dataset_root: the folder.
    :param n_experiences: number of tasks; a divisor of the number of classes.
    :param preprocessing: how images become tensors; pass
        ``image_preprocessing(model)`` of :mod:`treelora_avalanche.models`. By default timm's for
        ImageNet at 224 pixels.
    :param train_transform: acts on the resized uint8 image ``(3, height, width)`` of the train
        stream; by default ``preprocessing.normalize``. For augmentation, compose it with that.
    :param eval_transform: the same for the test stream.
    :param classes: names of the class folders to use; ``classes[i]`` gets label i. By default all,
        sorted by name.
    :param fixed_class_order: labels in the order in which they arrive; overrides the drawing.
    :param seed: seed of the class order and of the drawn split; None draws both from the global
        random state.
    :param shuffle: whether to draw the class order; if False, labels arrive in ascending order.
    :param test_fraction: share of each class that becomes the test set where none is given.
    :param cache_bytes: the resized images are kept in memory, as bytes, if all of them fit in
        here; otherwise files are read on access. Benchmarks of the same files and the same
        preprocessing share one copy.
    :param return_task_id: if True, every experience has a task label of its own, else all have 0.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``) and ``n_classes``.
    :raises ValueError: if the folder, the classes or their number do not fit; the message says how
        to mend it.
    :raises OSError: if an image cannot be read: here when images are kept in memory, else on
        access.
    """
    root = Path(dataset_root).expanduser()
    preprocessing = preprocessing or ImagePreprocessing()
    train, test, class_names = _list_images(root, classes, test_fraction, seed)
    train_set, test_set = _datasets([train, test], preprocessing, cache_bytes)
    return split_by_class(
        train_set,
        test_set,
        class_names,
        n_experiences,
        seed=seed,
        fixed_class_order=fixed_class_order,
        shuffle=shuffle,
        return_task_id=return_task_id,
        train_transform=train_transform or preprocessing.normalize,
        eval_transform=eval_transform or preprocessing.normalize,
    )


# --------------------------------------------------------------------------- which images there are


def _list_images(
    root: Path, classes: Sequence[str] | None, test_fraction: float, seed: int | None
) -> tuple[list[_Image], list[_Image], list[str]]:
    """The training images, the test images and the class names."""
    if not root.is_dir():
        raise ValueError(f"`dataset_root` is {str(root)!r}, which is not a folder. {LAYOUTS}.")
    given = [part for part in ("train", "test") if (root / part).is_dir()]
    if len(given) == 2:
        train_names, test_names = (_class_folders(root / part) for part in given)
        class_names = _choose_classes(root, train_names, test_names, classes)
        train, test = (list(chain(*_images_of(root / part, class_names))) for part in given)
        return train, test, class_names
    if given and next((root / given[0]).glob("*/"), None) is not None:
        missing = "test" if given == ["train"] else "train"
        raise ValueError(
            f"`dataset_root` {str(root)!r} has a folder {given[0]!r} with classes but none named "
            f"{missing!r}. {LAYOUTS}."
        )
    names = _class_folders(root)
    class_names = _choose_classes(root, names, names, classes)
    train, test = _draw_split(_images_of(root, class_names), class_names, test_fraction, seed)
    return train, test, class_names


# ---------------------------------------------------------------------------- from files to tensors


class _File(NamedTuple):
    """A file and what changes when it is written again."""

    path: str
    modified_ns: int
    size: int


def _stamp(path: str) -> _File:
    stat = os.stat(path)
    return _File(os.path.abspath(path), stat.st_mtime_ns, stat.st_size)


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
def _decoded(files: tuple[_File, ...], preprocessing: ImagePreprocessing) -> Tensor:
    """All images as bytes, ``(n, 3, height, width)``; seeds and methods share one copy."""
    return _stacked(len(files), preprocessing, lambda row: _read(files[row].path, preprocessing))


def _stacked(n: int, preprocessing: ImagePreprocessing, read: Callable[[int], Tensor]) -> Tensor:
    """``read(0)`` to ``read(n - 1)``, read by several threads, ``(n, 3, height, width)``."""
    images = torch.empty(n, *preprocessing.input_size, dtype=torch.uint8)

    def fill(row: int) -> None:
        images[row] = read(row)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow releases the GIL
        for _ in pool.map(fill, range(n)):
            pass
    return images


def _fits(n: int, preprocessing: ImagePreprocessing, cache_bytes: int) -> bool:
    return n * math.prod(preprocessing.input_size) <= cache_bytes


def _datasets(
    parts: Sequence[list[_Image]], preprocessing: ImagePreprocessing, cache_bytes: int
) -> list[_Images]:
    """One dataset per list of images, all over one copy in memory if that fits."""
    paths = sorted({image.path for part in parts for image in part})
    images, row_of = None, {}
    if _fits(len(paths), preprocessing, cache_bytes):
        images = _decoded(tuple(_stamp(path) for path in paths), preprocessing)
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
        samples: list[_Image],
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
