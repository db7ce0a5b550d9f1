"""CIFAR-100 as a class-incremental benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from avalanche.benchmarks import NCScenario
from avalanche.benchmarks.datasets import default_dataset_location
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from treelora_avalanche.models.vision import ImagePreprocessing, as_preprocessing
from treelora_avalanche.scenarios.data.class_incremental import divide_classes, split_by_class
from treelora_avalanche.scenarios.data.folders import select_classes
from treelora_avalanche.scenarios.data.images import (
    FileStamp,
    file_stamp,
    fits_in_cache,
    stack_images,
)
from treelora_avalanche.scenarios.data.limit import limit_rows
from treelora_avalanche.scenarios.data.task_file import TaskClasses


def SplitCIFAR100(
    n_experiences: int | None = None,
    *,
    dataset_root: str | Path | None = None,
    download: bool = True,
    preprocessing: ImagePreprocessing | nn.Module | None = None,
    train_transform: Callable[[Tensor], Any] | None = None,
    eval_transform: Callable[[Tensor], Any] | None = None,
    classes: Sequence[str] | None = None,
    per_exp_classes: Mapping[int, int] | None = None,
    fixed_class_order: Sequence[str | int] | None = None,
    task_classes: TaskClasses | None = None,
    seed: int | None = None,
    shuffle: bool = True,
    limit: int | None = None,
    cache_bytes: int = 2 * 1024**3,
    return_task_id: bool = False,
) -> NCScenario:
    """Returns CIFAR-100, split by class: 50,000 training and 10,000 test images of 100 classes.

    The images (Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images",
    https://www.cs.toronto.edu/~kriz/cifar.html) have 32 x 32 pixels; they are enlarged to the input
    size of the model. torchvision reads the published files, after a check of their checksums.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
        benchmark = SplitCIFAR100(10, preprocessing=model, seed=0)

    :param n_experiences: number of experiences, which share the classes evenly; by default 10, or
        that of ``task_classes``, or of ``per_exp_classes`` if they sum up to all classes.
    :param dataset_root: the folder that contains ``cifar-100-python``, or into which it is
        downloaded; by default Avalanche's folder for data sets.
    :param download: whether to download missing or damaged files (169 MB).
    :param preprocessing: resizing and normalisation of the images: pass the timm model, or its
        ``image_preprocessing(model)``. By default timm's for ImageNet at 224 pixels.
    :param train_transform: applied to the resized uint8 image ``(3, height, width)`` of the train
        stream; by default ``preprocessing.normalize``. For augmentation, compose it with that.
    :param eval_transform: the same for the test stream.
    :param classes: names of the classes to use, such as "apple"; ``classes[i]`` gets label i. By
        default all, with their published labels.
    :param per_exp_classes: number of classes by experience, from 0, such as ``{0: 50}``; the other
        experiences share the remaining classes evenly.
    :param fixed_class_order: names or labels of all classes in the order in which they arrive;
        overrides the drawn order. Strings are names; if none of them is one, they are labels.
    :param task_classes: names of the classes of each task, ``{"pets": ["cat", "dog"], ...}``, or a
        YAML or JSON file of that; instead of the three above and the drawn order.
    :param seed: seed of the class order; None draws it from the global random state.
    :param shuffle: whether to draw the class order; if False, labels arrive in ascending order.
    :param limit: number of training images, and of test images, used of each experience, drawn by
        ``seed`` and balanced over its classes; None for all.
    :param cache_bytes: limit of the resized images in memory, one byte per value (9.0 GB at 224
        pixels); above it, each image is resized on access. Benchmarks of the same preprocessing
        share one copy.
    :param return_task_id: if True, every experience has its own task label, else all have 0.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``) and ``n_classes``.
    :raises OSError: if the files are missing or damaged and could not be downloaded; the error
        names the archive and the folder to put it into.
    :raises ValueError: if a class is unknown, or the classes cannot be divided as asked for.
    """
    root = Path(dataset_root or default_dataset_location("cifar100")).expanduser()
    preprocessing = as_preprocessing(preprocessing)
    train, test = _readers(root, download)
    class_names = select_classes(root, train.classes, train.classes, classes)
    tasks = divide_classes(
        class_names,
        n_experiences,
        per_exp_classes=per_exp_classes,
        fixed_class_order=fixed_class_order,
        task_classes=task_classes,
        seed=seed,
        shuffle=shuffle,
    )
    labels = {train.classes.index(name): label for label, name in enumerate(class_names)}
    chosen = [np.flatnonzero(np.isin(part.targets, list(labels))) for part in (train, test)]
    targets = [
        [labels[part.targets[row]] for row in rows]
        for part, rows in zip((train, test), chosen, strict=True)
    ]
    if limit is not None:
        kept = limit_rows(targets, tasks, class_names, limit, seed)
        chosen = [rows[i] for rows, i in zip(chosen, kept, strict=True)]
        targets = [[ys[k] for k in i] for ys, i in zip(targets, kept, strict=True)]
    source = _Pixels(
        tuple(file_stamp(str(file)) for file, _ in _files(root)),
        tuple(class_names),
        () if limit is None else tuple(map(int, np.concatenate(chosen))),
        np.concatenate([part.data[rows] for part, rows in zip((train, test), chosen, strict=True)]),
    )
    images = None
    if fits_in_cache(len(source.pixels), preprocessing, cache_bytes):
        images = _resized(source, preprocessing)
    return split_by_class(
        _ResizedPixels(source, 0, targets[0], preprocessing, images),
        _ResizedPixels(source, len(targets[0]), targets[1], preprocessing, images),
        class_names,
        tasks,
        return_task_id=return_task_id,
        preprocessing=preprocessing,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def _files(root: Path) -> list[tuple[Path, str]]:
    """Returns the published files with their checksums."""
    listed = [*CIFAR100.train_list, *CIFAR100.test_list]
    listed.append([CIFAR100.meta["filename"], CIFAR100.meta["md5"]])
    return [(root / CIFAR100.base_folder / name, md5) for name, md5 in listed]


def _readers(root: Path, download: bool) -> tuple[CIFAR100, CIFAR100]:
    """Returns torchvision's readers of the training and the test images."""
    wrong = [
        f"{file.name} is {'damaged (wrong MD5)' if file.is_file() else 'missing'}"
        for file, md5 in _files(root)
        if not check_integrity(file, md5)
    ]
    archive = root / CIFAR100.filename
    remedy = (
        f"Fetch {CIFAR100.url} (169 MB, MD5 {CIFAR100.tgz_md5}) and save it as {str(archive)!r}; "
        "with `download=True` an intact archive is unpacked, not downloaded again."
    )
    state = f"in {str(root / CIFAR100.base_folder)!r} {', '.join(wrong)}"
    if wrong and not download:
        raise FileNotFoundError(f"CIFAR-100 is not complete: {state}. {remedy}")
    if wrong:
        try:
            # The reader's `download=True` overlooks missing class names.
            download_and_extract_archive(
                CIFAR100.url, root, filename=CIFAR100.filename, md5=CIFAR100.tgz_md5
            )
        # RuntimeError is torchvision's for a wrong checksum.
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"CIFAR-100 could not be downloaded ({error}): {state}. {remedy}"
            ) from error
    return CIFAR100(root, train=True), CIFAR100(root, train=False)


@dataclass(frozen=True)
class _Pixels:
    """The images of chosen classes, training images first; equal if read from the same files."""

    files: tuple[FileStamp, ...]
    classes: tuple[str, ...]
    limited_to: tuple[int, ...]  # positions in the published files; empty for all images
    pixels: np.ndarray = field(compare=False)  # (n, 32, 32, 3), uint8


def _resize(source: _Pixels, row: int, preprocessing: ImagePreprocessing) -> Tensor:
    return preprocessing.resize(Image.fromarray(source.pixels[row]))


@lru_cache(maxsize=2)
def _resized(source: _Pixels, preprocessing: ImagePreprocessing) -> Tensor:
    """Returns all images, uint8 ``(n, 3, height, width)``; seeds and methods share one copy."""
    return stack_images(
        len(source.pixels), preprocessing, lambda row: _resize(source, row, preprocessing)
    )


class _ResizedPixels(Dataset):
    """Consecutive images of a source as uint8 tensors with their labels.

    :param source: the images.
    :param first: the first row of this dataset in the source.
    :param targets: the labels.
    :param preprocessing: how images are resized.
    :param images: all resized images of the source, or None.
    """

    def __init__(
        self,
        source: _Pixels,
        first: int,
        targets: list[int],
        preprocessing: ImagePreprocessing,
        images: Tensor | None,
    ) -> None:
        self.source = source
        self.first = first
        self.targets = targets
        self.preprocessing = preprocessing
        self.images = images

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.first + index
        if self.images is not None:
            return self.images[row], self.targets[index]
        return _resize(self.source, row, self.preprocessing), self.targets[index]
