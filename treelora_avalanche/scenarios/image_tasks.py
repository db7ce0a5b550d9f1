"""Class-incremental benchmarks from a folder of images with one subfolder per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import NCScenario
from torch import Tensor, nn

from treelora_avalanche.choices import did_you_mean
from treelora_avalanche.models.vision import ImagePreprocessing, as_preprocessing
from treelora_avalanche.scenarios.data.class_incremental import split_by_class
from treelora_avalanche.scenarios.data.folders import (
    ImageRecord,
    list_class_folders,
    read_parts,
    select_classes,
)
from treelora_avalanche.scenarios.data.images import image_datasets
from treelora_avalanche.scenarios.data.limit import limit_images
from treelora_avalanche.scenarios.data.names import subfolders
from treelora_avalanche.scenarios.data.overlap import check_overlap

LAYOUTS = (
    "Accepted are <root>/<task>/<class>/<image>, from which a test set is drawn; "
    "<root>/<task>/train/<class>/<image> with <root>/<task>/test/<class>/<image>; or "
    "<root>/train/<task>/<class>/<image> with <root>/test/<task>/<class>/<image>"
)


def ImageTasks(
    dataset_root: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    preprocessing: ImagePreprocessing | nn.Module | None = None,
    train_transform: Callable[[Tensor], Any] | None = None,
    eval_transform: Callable[[Tensor], Any] | None = None,
    classes: Sequence[str] | None = None,
    seed: int | None = None,
    test_fraction: float = 0.2,
    limit: int | None = None,
    cache_bytes: int = 2 * 1024**3,
    return_task_id: bool = False,
    allow_overlap: bool = False,
) -> NCScenario:
    """Returns a folder of images, one subfolder per task with its own classes, as a benchmark.

    Every experience holds the classes of one task; tasks may have different numbers of them. Three
    layouts are accepted: ``root/<task>/<class>/*``, from which a stratified test set is drawn; a
    given split within a task, ``root/<task>/train/<class>/*`` with ``root/<task>/test/<class>/*``;
    and one for all tasks, ``root/train/<task>/<class>/*`` with ``root/test/<task>/<class>/*``. A
    class belongs to one task. For the same classes in every folder there is
    :func:`~treelora_avalanche.scenarios.DomainImageFolder`.

    Example::

        model = timm.create_model("vit_tiny_patch16_224", pretrained=True, num_classes=9)
        benchmark = ImageTasks("my_tasks", tasks=["birds", "cars"], preprocessing=model)
        benchmark.task_names

    :param dataset_root: the folder.
    :param tasks: names of the task folders to use, in order of arrival; by default all, sorted by
        name.
    :param preprocessing: resizing and normalisation of the images: pass the timm model, or its
        ``image_preprocessing(model)``. By default timm's for ImageNet at 224 pixels.
    :param train_transform: applied to the resized uint8 image ``(3, height, width)`` of the train
        stream; by default ``preprocessing.normalize``. For augmentation, compose it with that.
    :param eval_transform: the same for the test stream.
    :param classes: names of the class folders to use, of all tasks; ``classes[i]`` gets label i. By
        default all, in order of arrival, within a task sorted by name.
    :param seed: seed of the drawn split; None draws it from the global random state.
    :param test_fraction: share of each class that is drawn for testing if no split is given.
    :param limit: number of training images, and of test images, used of each task, drawn by
        ``seed`` and balanced over its classes; None for all.
    :param cache_bytes: limit of the resized images in memory, one byte per value; above it, files
        are read on access. Benchmarks of the same files and the same preprocessing share one copy.
    :param return_task_id: if True, every experience has its own task label, else all have 0.
    :param allow_overlap: whether an image may be for training and for testing, in any task.
    :return: the benchmark, one experience per task in both streams. It carries ``task_names``
        (``task_names[experience.current_experience]``), ``class_names`` (``class_names[label]``)
        and ``n_classes``.
    :raises ValueError: if the folder fits no layout, a task or a class is unknown, two tasks have a
        class of the same name, or images for training and for testing are equal.
    :raises OSError: if an image cannot be read (on access if the images are not cached).
    """
    root = Path(dataset_root).expanduser()
    preprocessing = as_preprocessing(preprocessing)
    folders = _task_folders(root, tasks)
    class_names, chosen = _classes_of_tasks(root, folders, classes)
    if seed is None:  # one seed for the splits of all tasks
        seed = int(torch.randint(2**31, ()))
    train: list[ImageRecord] = []
    test: list[ImageRecord] = []
    for task, parts in folders.items():
        of_task = None if classes is None else chosen[task]
        *images, names = read_parts(root / task, parts, of_task, test_fraction, seed, LAYOUTS)
        labels = [class_names.index(name) for name in names]
        for found, part in zip(images, (train, test), strict=True):
            part += [ImageRecord(image.path, labels[image.label]) for image in found]
    if not allow_overlap:
        check_overlap(root, train, test)
    divided = [[class_names.index(name) for name in names] for names in chosen.values()]
    train, test = limit_images([train, test], divided, class_names, limit, seed)
    train_set, test_set = image_datasets([train, test], preprocessing, cache_bytes)
    benchmark = split_by_class(
        train_set,
        test_set,
        class_names,
        divided,
        return_task_id=return_task_id,
        preprocessing=preprocessing,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )
    benchmark.task_names = list(folders)
    return benchmark


def _task_folders(root: Path, tasks: Sequence[str] | None) -> dict[str, list[Path]]:
    """Returns the folders of each task for training and for testing, or the one to draw from."""
    if not root.is_dir():
        raise ValueError(f"`dataset_root` should be a folder, but is {str(root)!r}. {LAYOUTS}.")
    roots = _given_parts(root)
    found = [subfolders(part) for part in roots]
    alone = sorted(set(found[0]) ^ set(found[-1]))
    if tasks is None and alone:
        raise ValueError(
            f"'train' and 'test' of `dataset_root` {str(root)!r} should hold the same tasks, but "
            f"do not (in one of them only: {', '.join(alone)}). Complete them, or name the common "
            "ones in `tasks=`."
        )
    known = [name for name in found[0] if name not in alone]
    if not known:
        raise ValueError(f"`dataset_root` {str(root)!r} holds no task folders. {LAYOUTS}.")
    names = known if tasks is None else list(tasks)
    if not names or isinstance(tasks, str) or len(set(names)) < len(names):
        raise ValueError(
            f"`tasks` should be a list of different task names, but is {tasks!r}. Name each once."
        )
    for name in names:
        if name not in known:
            raise ValueError(
                f"`tasks` should name some of the {len(known)} task folders of {str(root)!r} "
                f"({', '.join(known)}), but contains {name!r}.{did_you_mean(name, known)}"
            )
    if len(roots) == 2:
        return {name: [part / name for part in roots] for name in names}
    return {name: _given_parts(root / name) for name in names}


def _given_parts(folder: Path) -> list[Path]:
    given = [folder / part for part in ("train", "test") if part in subfolders(folder)]
    nested = [part for part in given if subfolders(part)]
    if len(given) == 2:
        return given
    if nested:
        missing = "test" if nested[0].name == "train" else "train"
        raise ValueError(
            f"{str(folder)!r} has a folder {nested[0].name!r} with subfolders but none named "
            f"{missing!r}. {LAYOUTS}."
        )
    return [folder]


def _classes_of_tasks(
    root: Path, folders: dict[str, list[Path]], classes: Sequence[str] | None
) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the class names by label, and those of each task."""
    found = {task: list_class_folders(parts[0], LAYOUTS) for task, parts in folders.items()}
    task_of: dict[str, str] = {}
    for task, names in found.items():
        for name in names:
            if name in task_of:
                raise ValueError(
                    f"the class {name!r} of `dataset_root` {str(root)!r} should belong to one "
                    f"task, but is in {task_of[name]!r} and in {task!r}. Rename one if they "
                    "differ; the same classes in every folder are for `DomainImageFolder` "
                    "(`--scenario domains`)."
                )
            task_of[name] = task
    names = list(chain(*found.values()))
    chosen = select_classes(root, names, names, classes)
    by_task = {task: [name for name in chosen if task_of[name] == task] for task in found}
    for task, names in by_task.items():
        if not names:
            raise ValueError(
                f"`classes` should name a class of each task, but names none of {task!r}. Leave "
                "the task out with `tasks=`."
            )
    return chosen, by_task
