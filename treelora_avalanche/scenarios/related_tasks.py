"""Streams whose tasks are known to be related, to see whether a method makes use of it.

Each benchmark made here carries ``groups``: for every experience the name of the group of tasks
that it is of. It is the truth against which to evaluate; nothing shows it to a strategy.
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
from torch import Tensor

from treelora_avalanche.choices import check_known
from treelora_avalanche.models.digits import load_digits
from treelora_avalanche.models.vision import ImagePreprocessing
from treelora_avalanche.scenarios.digits import _LabelledImages
from treelora_avalanche.scenarios.image_folder import SplitImageFolder
from treelora_avalanche.scenarios.o_lora import classification_tasks
from treelora_avalanche.scenarios.text_tasks import text_benchmark

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
"""Classes of Caltech-101 by what they show, for :func:`GroupedImageFolder`."""

TEXT_GROUPS = {
    "sentiment": ("amazon", "IMDB", "SST-2"),
    "topic": ("agnews", "dbpedia"),
    "inference": ("MNLI", "RTE", "CB"),
}
"""Tasks of O-LoRA's benchmark by what they ask, for :func:`GroupedTexts`."""


def ReturningTasks(
    benchmark: Any, times: int = 2, *, order: str = "shuffled", seed: int | None = None
) -> GenericCLScenario:
    """Lets every task of a benchmark come several times, each time with other images.

    The training and the test images of a task are divided, class by class, into disjoint parts of
    equal size; a part that it takes to make them equal is left over. The parts of a task are one
    group.

    :param benchmark: any benchmark of classification with a train and a test stream.
    :param times: how often each task comes.
    :param order: ``"shuffled"``, in random order; ``"rounds"``, all tasks once in the order of the
        benchmark, then all of them again (A B C A' B' C').
    :param seed: seed of the parts and of the order; None draws both from the global random state.
    :return: the benchmark, with ``times`` as many experiences and ``groups``, one name for each;
        ``class_names`` and ``n_classes`` are those of the given one, where it has them.
    :raises ValueError: if a class has fewer images than parts, or an argument is out of range.
    """
    check_known("`order`", order, ORDERS)
    if times < 1:
        raise ValueError(f"`times` must be at least 1, and is {times}.")
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
    preprocessing: ImagePreprocessing | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> NCScenario:
    """A folder of classes, whose tasks hold new classes, all of one group.

    Which classes of a group share a task, and the order of the tasks, are drawn.

    :param dataset_root: see :func:`~treelora_avalanche.scenarios.SplitImageFolder`.
    :param groups: the class folders of each group, such as :data:`CALTECH101_GROUPS`.
    :param classes_per_task: classes in each task; a divisor of the size of every group.
    :param preprocessing: see :func:`~treelora_avalanche.scenarios.SplitImageFolder`.
    :param seed: seed of all draws; None draws from the global random state.
    :param kwargs: further arguments of :func:`~treelora_avalanche.scenarios.SplitImageFolder`.
    :return: the benchmark, with ``groups``, one name for each experience.
    :raises ValueError: if the folder, the groups or their size do not fit.
    """
    generator = _generator(seed)
    tasks: list[tuple[str, list[str]]] = []
    for group, names in groups.items():
        if classes_per_task < 1 or len(names) % classes_per_task:
            raise ValueError(
                f"`classes_per_task` is {classes_per_task}, which does not divide the "
                f"{len(names)} classes of {group!r}; add or leave out some of them."
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
        seed=seed,
        shuffle=False,
        **kwargs,
    )
    benchmark.groups = [group for group, _ in tasks]
    return benchmark


def GroupedTexts(
    data_root: str | Path,
    model: Any,
    groups: Mapping[str, Sequence[str]] = TEXT_GROUPS,
    *,
    limit: int | None = None,
    max_length: int = 1024,
    seed: int | None = None,
) -> CLScenario:
    """O-LoRA's text classifications in random order, some of which ask the same of their texts.

    :param data_root: see :func:`~treelora_avalanche.scenarios.OLoRAOrder`.
    :param model: see :func:`~treelora_avalanche.scenarios.OLoRAOrder`.
    :param groups: the tasks of each group.
    :param limit: see :func:`~treelora_avalanche.scenarios.OLoRAOrder`.
    :param max_length: see :func:`~treelora_avalanche.scenarios.OLoRAOrder`.
    :param seed: seed of the order; None draws it from the global random state.
    :return: the benchmark, with ``task_names`` and ``groups``, one name for each experience.
    :raises FileNotFoundError: if a task is missing.
    :raises ValueError: if there is no such task, or a file does not hold its records.
    """
    tasks = [(group, name) for group, names in groups.items() for name in names]
    tasks = _shuffled(tasks, _generator(seed))
    built = classification_tasks(data_root, [name for _, name in tasks])
    benchmark = text_benchmark(built, model, limit=limit, max_length=max_length)
    benchmark.groups = [group for group, _ in tasks]
    return benchmark


def DomainDigits(*, seed: int = 0) -> GenericCLScenario:
    """Scikit-learn's digits in four renditions: a domain-incremental stream without a download.

    As they are; as a negative; turned by 90 degrees; and with their pixels in another, fixed order.
    Every experience holds all ten classes, and its own quarter of the images. A model that was
    pretrained on digits as they are (:func:`~treelora_avalanche.models.pretrained_digits_vit`) has
    everything to learn of the others, and what it learns of one is of little use for the next.

    :param seed: seed of the order of the pixels, of the quarters, and of the order of the
        renditions.
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
            _LabelledImages(render(images[rows]), labels[rows])
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
    """The domain where there are domains, else the classes."""
    if hasattr(benchmark, "domain_names"):
        return str(benchmark.domain_names[i])
    return ", ".join(map(str, sorted(benchmark.train_stream[i].classes_in_this_experience)))


def _divided(dataset: Any, times: int, generator: torch.Generator) -> list[Any]:
    targets = torch.tensor([int(target) for target in dataset.targets])
    return [dataset.subset(rows) for rows in _parts(targets, times, generator)]


def _parts(targets: Tensor, times: int, generator: torch.Generator) -> list[list[int]]:
    """Rows in disjoint parts, each with the same number of every class."""
    rows: list[list[int]] = [[] for _ in range(times)]
    for label in targets.unique().tolist():
        of_class = (targets == label).nonzero().squeeze(1)
        if len(of_class) < times:
            raise ValueError(
                f"`times` is {times}, and class {label} has only {len(of_class)} images in an "
                "experience; lower it."
            )
        drawn = of_class[torch.randperm(len(of_class), generator=generator)]
        n = len(of_class) // times
        for part in range(times):
            rows[part] += drawn[part * n : (part + 1) * n].tolist()
    return [sorted(part) for part in rows]
