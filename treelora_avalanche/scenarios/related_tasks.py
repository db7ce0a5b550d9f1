"""Streams with known relations between tasks, to measure whether a method uses them.

Each benchmark carries ``groups``: the name of the group of each experience's task. It is ground
truth for evaluation; strategies do not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from avalanche.benchmarks import (
    CLScenario,
    GenericCLScenario,
    NCScenario,
    dataset_benchmark,
)
from torch import Tensor, nn

from treelora_avalanche.choices import check_known
from treelora_avalanche.experiences import classes_of
from treelora_avalanche.models.digits import load_digits
from treelora_avalanche.models.vision import ImagePreprocessing
from treelora_avalanche.scenarios.data.text_benchmark import text_benchmark
from treelora_avalanche.scenarios.digits import LabelledImages
from treelora_avalanche.scenarios.image_folder import SplitImageFolder
from treelora_avalanche.scenarios.o_lora import classification_tasks

T = TypeVar("T")

ORDERS = ("shuffled", "rounds")

CALTECH101_GROUPS = {
    "mammals": (
        "beaver", "dalmatian", "elephant", "gerenuk", "hedgehog", "kangaroo", "llama", "okapi",
        "panda", "platypus", "rhino", "wild_cat",
    ),
    "vehicles": (
        "Motorbikes", "airplanes", "car_side", "ferry", "helicopter", "ketch", "schooner",
        "wheelchair",
    ),
    "music": (
        "accordion", "electric_guitar", "euphonium", "gramophone", "grand_piano", "mandolin",
        "metronome", "saxophone",
    ),
}  # fmt: skip
"""Classes of Caltech-101 by subject, for :func:`GroupedImageFolder`."""

TEXT_GROUPS = {
    "sentiment": ("amazon", "IMDB", "SST-2"),
    "topic": ("agnews", "dbpedia"),
    "inference": ("MNLI", "RTE", "CB"),
}
"""Tasks of O-LoRA's benchmark by instruction, for :func:`GroupedTexts`."""


def ReturningTasks(
    benchmark: Any, times: int = 2, *, order: str = "shuffled", seed: int | None = None
) -> GenericCLScenario:
    """Repeats every task of a benchmark, each time with other images.

    The training and the test images of a task are divided, class by class, into disjoint parts of
    equal size; what remains of a class is not used. The parts of a task form one group.

    Example::

        stream = ReturningTasks(SplitDigits(5, seed=0), 2, order="rounds", seed=0)
        stream.groups[0] == stream.groups[5]  # the same classes, other images

    :param benchmark: any classification benchmark with a train and a test stream.
    :param times: how often each task occurs.
    :param order: ``"shuffled"``, random; ``"rounds"``, all tasks in the order of the benchmark,
        then all of them again (A B C A' B' C').
    :param seed: seed of the parts and of the order; None draws both from the global random state.
    :return: the benchmark, with ``times`` as many experiences and ``groups``, one name each;
        ``class_names`` and ``n_classes`` are those of the given one, if it has them.
    :raises ValueError: if a class has fewer images than parts, ``times`` is not positive, or
        ``order`` is unknown.
    """
    check_known("`order`", order, ORDERS)
    if times < 1:
        raise ValueError(f"`times` should be at least 1, but is {times}. The usual number is 2.")
    generator = _generator(seed)
    tasks: list[tuple[str, Any, Any]] = []
    for i, pair in enumerate(zip(benchmark.train_stream, benchmark.test_stream, strict=True)):
        train, test = (_divided(experience.dataset, times, generator) for experience in pair)
        tasks += [(_name(benchmark, i), *parts) for parts in zip(train, test, strict=True)]
    if order == "rounds":
        tasks = [task for part in range(times) for task in tasks[part::times]]
    else:
        tasks = _shuffled(tasks, generator)
    groups, train_sets, test_sets = zip(*tasks, strict=True)
    returning = dataset_benchmark(train_sets, test_sets)
    returning.groups = list(groups)
    for name in ("class_names", "n_classes"):
        if hasattr(benchmark, name):
            setattr(returning, name, getattr(benchmark, name))
    return returning


def GroupedImageFolder(
    dataset_root: str | Path,
    groups: Mapping[str, Sequence[str]],
    classes_per_task: int = 4,
    *,
    preprocessing: ImagePreprocessing | nn.Module | None = None,
    train_transform: Callable[[Tensor], Any] | None = None,
    eval_transform: Callable[[Tensor], Any] | None = None,
    seed: int | None = None,
    test_fraction: float = 0.2,
    cache_bytes: int = 2 * 1024**3,
    return_task_id: bool = False,
    allow_overlap: bool = False,
) -> NCScenario:
    """Returns a class-incremental benchmark in which the classes of a task are of one group.

    Which classes of a group form a task, and the order of the tasks, are drawn. For the layouts of
    the folder see :func:`~treelora_avalanche.scenarios.SplitImageFolder`.

    Example::

        stream = GroupedImageFolder("caltech101", CALTECH101_GROUPS, classes_per_task=4, seed=0)
        stream.groups[0]  # such as "mammals"

    :param dataset_root: the folder.
    :param groups: the class folders of each group, such as :data:`CALTECH101_GROUPS`.
    :param classes_per_task: classes in each task; a divisor of the size of every group.
    :param preprocessing: resizing and normalisation of the images: pass the timm model, or its
        ``image_preprocessing(model)``. By default timm's for ImageNet at 224 pixels.
    :param train_transform: applied to the resized uint8 image ``(3, height, width)`` of the train
        stream; by default ``preprocessing.normalize``. For augmentation, compose it with that.
    :param eval_transform: the same for the test stream.
    :param seed: seed of all draws; None draws from the global random state.
    :param test_fraction: share of each class that is drawn for testing if no split is given.
    :param cache_bytes: limit of the resized images in memory, one byte per value; above it, files
        are read on access. Benchmarks of the same files and the same preprocessing share one copy.
    :param return_task_id: if True, every experience has its own task label, else all have 0.
    :param allow_overlap: whether an image may be for training and for testing.
    :return: the benchmark, with ``groups``, one name for each experience.
    :raises ValueError: if the folder fits no layout, a class is unknown, or ``classes_per_task``
        does not divide every group.
    """
    generator = _generator(seed)
    tasks: list[tuple[str, list[str]]] = []
    for group, names in groups.items():
        if classes_per_task < 1 or len(names) % classes_per_task:
            raise ValueError(
                f"`classes_per_task` should divide the {len(names)} classes of {group!r} evenly, "
                f"but is {classes_per_task}. Change it, or add or leave out classes."
            )
        drawn = _shuffled(names, generator)
        tasks += [
            (group, drawn[i : i + classes_per_task]) for i in range(0, len(names), classes_per_task)
        ]
    tasks = _shuffled(tasks, generator)
    benchmark = SplitImageFolder(
        dataset_root,
        len(tasks),
        classes=[name for _, names in tasks for name in names],
        preprocessing=preprocessing,
        train_transform=train_transform,
        eval_transform=eval_transform,
        seed=seed,
        shuffle=False,
        test_fraction=test_fraction,
        cache_bytes=cache_bytes,
        return_task_id=return_task_id,
        allow_overlap=allow_overlap,
    )
    benchmark.groups = [group for group, _ in tasks]
    return benchmark


def GroupedTexts(
    data_root: str | Path,
    model: Any,
    groups: Mapping[str, Sequence[str]] = TEXT_GROUPS,
    *,
    limit: int | None = None,
    eval_limit: int | str | None = None,
    max_length: int = 1024,
    seed: int | None = None,
) -> CLScenario:
    """Returns O-LoRA's text classifications in random order; the tasks of a group are alike.

    Example::

        stream = GroupedTexts("data", create_language_model("gpt2"), seed=0)
        dict(zip(stream.task_names, stream.groups))

    :param data_root: the folder that contains ``CL_Benchmark``, or that folder itself.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` to train, or a tokenizer.
    :param groups: the tasks of each group.
    :param limit: number of records used of each file, from its start; None for all.
    :param eval_limit: the same for testing, or ``"all"``; None for ``limit``.
    :param max_length: limit of the tokens of a prompt and its answer if ``model`` is a tokenizer.
    :param seed: seed of the order; None draws it from the global random state.
    :return: the benchmark, with ``task_names`` and ``groups``, one name for each experience.
    :raises FileNotFoundError: if a task is missing.
    :raises ValueError: if a task is unknown, or a file does not hold its records.
    """
    tasks = [(group, name) for group, names in groups.items() for name in names]
    tasks = _shuffled(tasks, _generator(seed))
    built = classification_tasks(data_root, [name for _, name in tasks])
    benchmark = text_benchmark(
        built, model, limit=limit, eval_limit=eval_limit, max_length=max_length
    )
    benchmark.groups = [group for group, _ in tasks]
    return benchmark


def DomainDigits(*, seed: int = 0) -> GenericCLScenario:
    """Returns scikit-learn's digits in four renditions: domain-incremental, without a download.

    Plain; negative; turned by 90 degrees; and with their pixels permuted. Every experience holds
    all ten classes, and its own quarter of the images. A model that was pretrained on plain digits
    (:func:`~treelora_avalanche.models.pretrained_digits_vit`) transfers little to the others, and
    one of these transfers little to the next.

    >>> sorted(DomainDigits(seed=0).domain_names)
    ['negative', 'plain', 'shuffled', 'turned']

    :param seed: seed of the permutation, of the quarters, and of the order of the renditions.
    :return: the benchmark; it carries ``domain_names``, ``class_names`` and ``n_classes``.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randperm(64, generator=generator)
    renditions: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda images: images,
        "negative": lambda images: -images,
        "turned": lambda images: images.rot90(1, (2, 3)),
        "shuffled": lambda images: images.flatten(1)[:, pixels].view_as(images),
    }
    digits = load_digits()
    parts = [
        [
            LabelledImages(render(images[rows]), labels[rows])
            for render, rows in zip(renditions.values(), quarters, strict=True)
        ]
        for images, labels in (digits[:2], digits[2:])
        for quarters in [_parts(labels, len(renditions), generator)]
    ]
    order = torch.randperm(len(renditions), generator=generator).tolist()
    benchmark = dataset_benchmark(*([part[i] for i in order] for part in parts))
    names = [list(renditions)[i] for i in order]
    benchmark.domain_names = names
    benchmark.class_names = [str(digit) for digit in range(10)]
    benchmark.n_classes = 10
    return benchmark


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)


def _shuffled(items: Sequence[T], generator: torch.Generator) -> list[T]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def _name(benchmark: Any, i: int) -> str:
    """Returns the name of the domain if there are domains, else the classes."""
    if hasattr(benchmark, "domain_names"):
        return str(benchmark.domain_names[i])
    return ", ".join(map(str, classes_of(benchmark.train_stream[i])))


def _divided(dataset: Any, times: int, generator: torch.Generator) -> list[Any]:
    targets = torch.tensor([int(target) for target in dataset.targets])
    return [dataset.subset(rows) for rows in _parts(targets, times, generator)]


def _parts(targets: Tensor, times: int, generator: torch.Generator) -> list[list[int]]:
    """Divides rows into disjoint parts, each with the same number of every class."""
    rows: list[list[int]] = [[] for _ in range(times)]
    for label in targets.unique().tolist():
        of_class = (targets == label).nonzero().squeeze(1)
        if len(of_class) < times:
            raise ValueError(
                f"`times` should be at most the images of every class in an experience, but is "
                f"{times}, and class {label} has only {len(of_class)}. Lower it."
            )
        drawn = of_class[torch.randperm(len(of_class), generator=generator)]
        n = len(of_class) // times
        for part in range(times):
            rows[part] += drawn[part * n : (part + 1) * n].tolist()
    return [sorted(part) for part in rows]
