"""CUB-200-2011 as a class-incremental benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avalanche.benchmarks import NCScenario
from torch import Tensor, nn

from treelora_avalanche.models.vision import ImagePreprocessing, as_preprocessing
from treelora_avalanche.scenarios.data.archives import CUB_200_2011, published_folder
from treelora_avalanche.scenarios.data.class_incremental import divide_classes, split_by_class
from treelora_avalanche.scenarios.data.folders import ImageRecord, select_classes
from treelora_avalanche.scenarios.data.images import image_datasets
from treelora_avalanche.scenarios.data.limit import limit_images
from treelora_avalanche.scenarios.data.task_file import TaskClasses

TEXT_FILES = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")


def SplitCUB200(
    n_experiences: int | None = None,
    *,
    dataset_root: str | Path,
    download: bool = False,
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
    """Returns CUB-200-2011, split by class: 5,994 training and 5,794 test images of 200 birds.

    Reads the images and the official split of Wah et al. 2011, "The Caltech-UCSD Birds-200-2011
    Dataset" (https://data.caltech.edu/records/65de6-vp158), in the published layout: ``images/``,
    ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``, ``classes.txt``. The
    classes are those of ``classes.txt``, label i its i-th line, so that a part of the data set can
    be read too. (Avalanche's reader needs the bounding boxes and exactly 200 classes.)

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=200)
        benchmark = SplitCUB200(
            10, dataset_root="data", preprocessing=model, seed=0
        )

    :param n_experiences: number of experiences, which share the classes evenly; by default 10, or
        that of ``task_classes``, or of ``per_exp_classes`` if they sum up to all classes.
    :param dataset_root: the folder that contains ``CUB_200_2011``, or that folder itself.
    :param download: whether to download and unpack a missing archive (1.2 GB).
    :param preprocessing: resizing and normalisation of the images: pass the timm model, or its
        ``image_preprocessing(model)``. By default timm's for ImageNet at 224 pixels.
    :param train_transform: applied to the resized uint8 image ``(3, height, width)`` of the train
        stream; by default ``preprocessing.normalize``. For augmentation, compose it with that.
    :param eval_transform: the same for the test stream.
    :param classes: names of the classes to use, as in ``classes.txt``; ``classes[i]`` gets label i.
        By default all.
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
    :param cache_bytes: limit of the resized images in memory, one byte per value (1.8 GB at 224
        pixels); above it, files are read on access. Benchmarks of the same files and the same
        preprocessing share one copy.
    :param return_task_id: if True, every experience has its own task label, else all have 0.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``) and ``n_classes``.
    :raises ValueError: if the text files contradict each other, or the classes cannot be divided as
        asked for.
    :raises OSError: if the folder, one of its text files or an image that they list is missing; if
        the archive cannot be downloaded; if an image cannot be read (on access if the images are
        not cached).
    """
    root = published_folder(CUB_200_2011, dataset_root, download, _is_cub)
    preprocessing = as_preprocessing(preprocessing)
    train, test, class_names = _read_lists(root, classes)
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


def _is_cub(root: Path) -> bool:
    return any((root / name).is_file() for name in TEXT_FILES)


def _read_lists(
    root: Path, classes: Sequence[str] | None
) -> tuple[list[ImageRecord], list[ImageRecord], list[str]]:
    """Returns the training images, the test images and the class names."""
    missing = [name for name in TEXT_FILES if not (root / name).is_file()]
    if not (root / "images").is_dir():
        missing.append("images/")
    if missing:
        raise FileNotFoundError(
            f"{str(root)!r} is not a complete {CUB_200_2011.title}: {', '.join(missing)} missing. "
            f"Unpack {CUB_200_2011.url} again."
        )
    names, paths, class_of, split_of = (_read_column(root / name) for name in TEXT_FILES)
    _check_lists(root, names, paths, class_of, split_of)

    all_names = list(names.values())
    class_names = select_classes(root, all_names, all_names, classes)
    label_of = {key: class_names.index(name) for key, name in names.items() if name in class_names}
    train: list[ImageRecord] = []
    test: list[ImageRecord] = []
    for key, path in paths.items():
        if class_of[key] in label_of:
            image = ImageRecord(str(root / "images" / path), label_of[class_of[key]])
            (train if split_of[key] == "1" else test).append(image)

    for part, images in (("training", train), ("test", test)):
        empty = set(range(len(class_names))) - {image.label for image in images}
        if empty:
            listed = ", ".join(class_names[label] for label in sorted(empty))
            raise ValueError(
                f"the lists in {str(root)!r} give no {part} images of {listed}. Unpack "
                f"{CUB_200_2011.url} again, or leave these classes out with `classes=`."
            )
    absent = [image.path for image in train + test if not Path(image.path).is_file()]
    if absent:
        listed = ", ".join(map(repr, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise FileNotFoundError(
            f"{len(absent)} of the {len(train + test)} images that {str(root / 'images.txt')!r} "
            f"lists are missing: {listed}. Unpack {CUB_200_2011.url} again."
        )
    return train, test, class_names


def _read_column(file: Path) -> dict[str, str]:
    """Returns the second column of a text file, by the first, which numbers the lines."""
    column: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split(maxsplit=1)
        if not fields:
            continue
        if len(fields) != 2 or not fields[0].isdecimal() or fields[0] in column:
            raise ValueError(
                f"line {number} of {str(file)!r} should be a new number and a value, but is "
                f"{line!r}. "
                f"Unpack {CUB_200_2011.url} again."
            )
        column[fields[0]] = fields[1].strip()
    return column


def _check_lists(
    root: Path,
    names: dict[str, str],
    paths: dict[str, str],
    class_of: dict[str, str],
    split_of: dict[str, str],
) -> None:
    problems = []
    for file, column in ((TEXT_FILES[2], class_of), (TEXT_FILES[3], split_of)):
        if lacking := [path for key, path in paths.items() if key not in column]:
            problems.append(f"{file} lacks {len(lacking)} images of images.txt, as {lacking[0]}")
        if unlisted := [key for key in column if key not in paths]:
            problems.append(f"images.txt lacks {len(unlisted)} images of {file}, as {unlisted[0]}")
    if unknown := sorted(set(class_of.values()) - set(names)):
        problems.append(
            f"classes.txt lacks the classes {', '.join(unknown[:5])} of {TEXT_FILES[2]}"
        )
    if strange := sorted(set(split_of.values()) - {"0", "1"}):
        problems.append(f"{TEXT_FILES[3]} should hold 0 or 1, but holds {', '.join(strange[:5])}")
    if problems:
        raise ValueError(
            f"the lists in {str(root)!r} contradict each other: {'; '.join(problems)}. Unpack "
            f"{CUB_200_2011.url} again."
        )
