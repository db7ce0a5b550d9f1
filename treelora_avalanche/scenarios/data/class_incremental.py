"""Class-incremental benchmarks: the classes of a dataset, divided among experiences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from avalanche.benchmarks import NCScenario, nc_benchmark

from treelora_avalanche.choices import did_you_mean
from treelora_avalanche.models.vision import ImagePreprocessing
from treelora_avalanche.scenarios.data.task_file import TaskClasses, read_task_classes

N_EXPERIENCES = 10
"""Default number of experiences of image streams."""
_LISTED = 10


def split_by_class(
    train_dataset: Any,
    test_dataset: Any,
    class_names: Sequence[str],
    tasks: Sequence[Sequence[int]],
    *,
    return_task_id: bool = False,
    preprocessing: ImagePreprocessing | None = None,
    train_transform: Any = None,
    eval_transform: Any = None,
) -> NCScenario:
    """Returns Avalanche's ``nc_benchmark`` with the given classes in each experience.

    Labels are not remapped: a label means the same class in every order.

    Example::

        names = ["ant", "bee", "cat", "dog"]
        benchmark = split_by_class(train, test, names, divide_classes(names, 2, seed=0))
        benchmark.class_names[benchmark.classes_order[0]]

    :param train_dataset: map-style dataset of (image, label) with an attribute ``targets``.
    :param test_dataset: the same for testing.
    :param class_names: the name of each label.
    :param tasks: the labels of each experience, from :func:`divide_classes`.
    :param return_task_id: if True, every experience has its own task label, else all have 0.
    :param preprocessing: of images, kept on the benchmark; its ``normalize`` is the default
        transform.
    :param train_transform: applied to the images of the train stream.
    :param eval_transform: applied to the images of the test stream.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``) and ``n_classes``.
    """
    normalize = None if preprocessing is None else preprocessing.normalize
    benchmark = nc_benchmark(
        train_dataset,
        test_dataset,
        n_experiences=len(tasks),
        task_labels=return_task_id,
        fixed_class_order=list(chain(*tasks)),
        per_exp_classes={experience: len(labels) for experience, labels in enumerate(tasks)},
        train_transform=train_transform or normalize,
        eval_transform=eval_transform or normalize,
    )
    benchmark.class_names = list(class_names)
    if preprocessing is not None:
        benchmark.preprocessing = preprocessing if eval_transform is None else None
    return benchmark


def divide_classes(
    class_names: Sequence[str],
    n_experiences: int | None = None,
    *,
    per_exp_classes: Mapping[int, int] | None = None,
    fixed_class_order: Sequence[str | int] | None = None,
    task_classes: TaskClasses | None = None,
    seed: int | None = None,
    shuffle: bool = True,
) -> list[list[int]]:
    """Returns the labels of each experience, in the order in which they arrive.

    The order is the one that Avalanche's ``nc_benchmark`` draws, but the global random state is
    left unchanged if a ``seed`` is given.

    >>> divide_classes(["ant", "bee", "cat"], 2, per_exp_classes={0: 2}, shuffle=False)
    [[0, 1], [2]]
    >>> divide_classes(["ant", "bee", "cat"], task_classes=[["cat"], ["bee", "ant"]])
    [[2], [1, 0]]

    :param class_names: the name of each label.
    :param n_experiences: number of experiences; by default 10, or that of ``task_classes``, or of
        ``per_exp_classes`` if its numbers sum up to that of the classes.
    :param per_exp_classes: number of classes by experience, from 0; the other experiences share
        the remaining classes evenly.
    :param fixed_class_order: names or labels of the classes in the order in which they arrive;
        overrides the drawn order. Strings are names; if none of them is one, they are labels.
    :param task_classes: the classes of each task, or a YAML or JSON file of them.
    :param seed: seed of the class order; None draws it from the global random state.
    :param shuffle: whether to draw the order; if False, labels arrive in ascending order.
    :raises ValueError: if a class is unknown, missing or named twice, or the numbers do not match.
    :raises FileNotFoundError: if the file is missing.
    """
    if task_classes is not None:
        for name, other in (
            ("per_exp_classes", per_exp_classes),
            ("fixed_class_order", fixed_class_order),
        ):
            if other is not None:
                raise ValueError(f"`task_classes` and `{name}` are both given. Choose one.")
        tasks = read_task_classes(task_classes)
        if n_experiences not in (None, len(tasks)):
            raise ValueError(
                f"`n_experiences` should be the {len(tasks)} tasks of `task_classes`, but is "
                f"{n_experiences}. Leave it out."
            )
        return _labels_of_tasks(tasks, class_names)
    sizes = _sizes(len(class_names), n_experiences, per_exp_classes)
    order = iter(_class_order(class_names, seed, fixed_class_order, shuffle))
    return [[next(order) for _ in range(size)] for size in sizes]


def _labels_of_tasks(
    tasks: Mapping[str, Sequence[str | int]], class_names: Sequence[str]
) -> list[list[int]]:
    labels, problems = _labels(list(chain(*tasks.values())), class_names)
    if problems:
        raise ValueError(
            f"`task_classes` should hold each of the {len(class_names)} classes once, but does "
            f"not ({problems}). Correct it, or choose the classes with `classes=`."
        )
    rest = iter(labels)
    return [[next(rest) for _ in names] for names in tasks.values()]


def _labels(given: Sequence[str | int], class_names: Sequence[str]) -> tuple[list[int], str]:
    """Returns the labels of classes given by name or label, and what is wrong with them."""
    label_of = {name: label for label, name in enumerate(class_names)}
    named = any(entry in label_of for entry in given)
    entries: list[str | int] = []  # labels, and unknown names
    for entry in given:
        if not isinstance(entry, str):
            entries.append(int(entry))
        elif named or not entry.isdecimal():
            entries.append(label_of.get(entry, entry))
        else:  # the command line leaves labels among names as text
            entries.append(int(entry))
    labels = [x for x in entries if isinstance(x, int) and x in range(len(class_names))]
    unknown = [x for x in entries if x not in range(len(class_names))]
    count = Counter(labels)

    def listed(problem: str, wrong: Sequence[str | int]) -> str:
        more = f", ... ({len(wrong)} in all)" if len(wrong) > _LISTED else ""
        return f"{problem}: {', '.join(map(repr, wrong[:_LISTED]))}{more}" if wrong else ""

    def shown(wrong: Iterable[int]) -> list[str | int]:
        return [class_names[x] if named else x for x in wrong]

    names = (name for name in unknown if isinstance(name, str))
    hint = "".join(did_you_mean(name, class_names) for name in islice(names, 1))
    problems = (
        listed("unknown", list(dict.fromkeys(unknown))) + hint,
        listed("more than once", shown(x for x, n in count.items() if n > 1)),
        listed("missing", shown(x for x in range(len(class_names)) if x not in count)),
    )
    return labels, "; ".join(filter(None, problems))


def _sizes(
    n_classes: int, n_experiences: int | None, per_exp_classes: Mapping[int, int] | None
) -> list[int]:
    """Returns the number of classes of each experience."""
    if per_exp_classes is None:
        n = N_EXPERIENCES if n_experiences is None else n_experiences
        _check_n_experiences(n, n_classes)
        return [n_classes // n] * n
    given, total = dict(per_exp_classes), sum(per_exp_classes.values())
    n = len(given) if total == n_classes else N_EXPERIENCES
    if n_experiences is not None:
        n = n_experiences
    if n < 1:
        _check_n_experiences(n, n_classes)
    for experience, size in given.items():
        if experience not in range(n):
            raise ValueError(
                f"`per_exp_classes` should number the {n} experiences from 0 to {n - 1}, but holds "
                f"{experience!r}. Change it, or `n_experiences`."
            )
        if size < 1:
            raise ValueError(
                f"`per_exp_classes` should be at least 1 for each experience, but is {size} for "
                f"experience {experience}. Lower `n_experiences` for fewer experiences."
            )
    rest, others = n_classes - total, n - len(given)
    if not others and rest:
        raise ValueError(
            f"`per_exp_classes` should sum up to the {n_classes} classes, but {given} sums up to "
            f"{total}. Change it, or `n_experiences`, which is {n}."
        )
    if others and (rest < others or rest % others):
        raise ValueError(
            f"`per_exp_classes` should leave classes that the other {others} of {n} experiences "
            f"share evenly, but {given} leaves {rest} of {n_classes}. Change it, or "
            "`n_experiences`."
        )
    return [given[k] if k in given else rest // others for k in range(n)]


def _check_n_experiences(n_experiences: int, n_classes: int) -> None:
    if n_experiences >= 1 and n_classes % n_experiences == 0:
        return
    divisors = [n for n in range(1, n_classes + 1) if n_classes % n == 0]
    fitting = n_classes - n_classes % n_experiences if 1 <= n_experiences <= n_classes else 0
    fewer = (
        f", or pass {fitting} of the class names as `classes=`, or uneven numbers as "
        "`per_exp_classes=`"
        if fitting
        else ""
    )
    raise ValueError(
        f"`n_experiences` should divide the {n_classes} classes evenly, but is {n_experiences}. "
        f"Use one of {', '.join(map(str, divisors))}{fewer}."
    )


def _class_order(
    class_names: Sequence[str],
    seed: int | None,
    fixed_class_order: Sequence[str | int] | None,
    shuffle: bool,
) -> list[int]:
    if fixed_class_order is not None:
        labels, problems = _labels(fixed_class_order, class_names)
        if problems:
            raise ValueError(
                f"`fixed_class_order` should hold every label from 0 to {len(class_names) - 1} "
                f"once, but is {list(fixed_class_order)} ({problems}). Names of classes are "
                "accepted too. Complete it, or pass `seed=` to draw an order."
            )
        return labels
    if not shuffle:
        return list(range(len(class_names)))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    order = torch.randperm(len(class_names), generator=generator).tolist()
    return order
