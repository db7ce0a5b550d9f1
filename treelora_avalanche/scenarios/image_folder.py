"""Class-incremental benchmarks from any folder of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avalanche.benchmarks import NCScenario
from torch import Tensor, nn

from treelora_avalanche.models.vision import ImagePreprocessing, as_preprocessing
from treelora_avalanche.scenarios.data.class_incremental import divide_classes, split_by_class
from treelora_avalanche.scenarios.data.folders import list_images
from treelora_avalanche.scenarios.data.images import image_datasets
from treelora_avalanche.scenarios.data.limit import limit_images
from treelora_avalanche.scenarios.data.overlap import check_overlap
from treelora_avalanche.scenarios.data.task_file import TaskClasses


def SplitImageFolder(
    dataset_root: str | Path,
    n_experiences: int | None = None,
    *,
    preprocessing: ImagePreprocessing | nn.Module | None = None,
    train_transform: Callable[[Tensor], Any] | None = None,
    eval_transform: Callable[[Tensor], Any] | None = None,
    classes: Sequence[str] | None = None,
    per_exp_classes: Mapping[int, int] | None = None,
    fixed_class_order: Sequence[str | int] | None = None,
    task_classes: TaskClasses | None = None,
    seed: int | None = None,
    shuffle: bool = True,
    test_fraction: float = 0.2,
    limit: int | None = None,
    cache_bytes: int = 2 * 1024**3,
    return_task_id: bool = False,
    allow_overlap: bool = False,
) -> NCScenario:
    """Returns a folder of images, one subfolder per class, as a class-incremental benchmark.

    Two layouts are accepted: ``root/train/<class>/*`` with ``root/test/<class>/*``, a given split;
    and ``root/<class>/*``, from which a stratified test set is drawn. Files that are not images,
    hidden names and folders that systems leave are ignored, images of any mode are read as RGB.

    Example::

        model = timm.create_model("vit_tiny_patch16_224", pretrained=True, num_classes=12)
        benchmark = SplitImageFolder(
            "pets", n_experiences=4, preprocessing=model, seed=0
        )

    :param dataset_root: the folder.
    :param n_experiences: number of experiences, which share the classes evenly; by default 10, or
        that of ``task_classes``, or of ``per_exp_classes`` if they sum up to all classes.
    :param preprocessing: resizing and normalisation of the images: pass the timm model, or its
        ``image_preprocessing(model)``. By default timm's for ImageNet at 224 pixels.
    :param train_transform: applied to the resized uint8 image ``(3, height, width)`` of the train
        stream; by default ``preprocessing.normalize``. For augmentation, compose it with that.
    :param eval_transform: the same for the test stream.
    :param classes: names of the class folders to use; ``classes[i]`` gets label i. By default all,
        sorted by name.
    :param per_exp_classes: number of classes by experience, from 0, such as ``{0: 50}``; the other
        experiences share the remaining classes evenly.
    :param fixed_class_order: names or labels of all classes in the order in which they arrive;
        overrides the drawn order. Strings are names; if none of them is one, they are labels.
    :param task_classes: names of the classes of each task, ``{"pets": ["cat", "dog"], ...}``, or a
        YAML or JSON file of that; instead of the three above and the drawn order.
    :param seed: seed of the class order and of the drawn split; None draws both from the global
        random state.
    :param shuffle: whether to draw the class order; if False, labels arrive in ascending order.
    :param test_fraction: share of each class that is drawn for testing if no split is given.
    :param limit: number of training images, and of test images, used of each experience, drawn by
        ``seed`` and balanced over its classes; None for all.
    :param cache_bytes: limit of the resized images in memory, one byte per value; above it, files
        are read on access. Benchmarks of the same files and the same preprocessing share one copy.
    :param return_task_id: if True, every experience has its own task label, else all have 0.
    :param allow_overlap: whether an image may be for training and for testing.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``) and ``n_classes``.
    :raises ValueError: if the folder fits no layout, a class is unknown, images for training and
        for testing are equal, or the classes cannot be divided as asked for.
    :raises OSError: if an image cannot be read (on access if the images are not cached).
    """
    root = Path(dataset_root).expanduser()
    preprocessing = as_preprocessing(preprocessing)
    train, test, class_names = list_images(root, classes, test_fraction, seed)
    if not allow_overlap:
        check_overlap(root, train, test)
    tasks = divide_classes(
        class_names,
        n_experiences,
        per_exp_classes=per_exp_classes,
        fixed_class_order=fixed_class_order,
        task_classes=task_classes,
        seed=seed,
        shuffle=shuffle,
    )
    train, test = limit_images([train, test], tasks, class_names, limit, seed)
    train_set, test_set = image_datasets([train, test], preprocessing, cache_bytes)
    return split_by_class(
        train_set,
        test_set,
        class_names,
        tasks,
        return_task_id=return_task_id,
        preprocessing=preprocessing,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )
