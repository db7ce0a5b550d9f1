"""Class-incremental benchmarks: the classes of a dataset, divided among experiences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks import NCScenario, nc_benchmark


def split_by_class(
    train_dataset: Any,
    test_dataset: Any,
    class_names: Sequence[str],
    n_experiences: int,
    *,
    seed: int | None = None,
    fixed_class_order: Sequence[int] | None = None,
    shuffle: bool = True,
    return_task_id: bool = False,
    train_transform: Any = None,
    eval_transform: Any = None,
) -> NCScenario:
    """Returns Avalanche's ``nc_benchmark`` with class names and errors that name the remedy.

    The order of the classes is the one that ``nc_benchmark`` draws, but the global random state is
    left unchanged if a ``seed`` is given. Labels are not remapped: a label means the same class in
    every order.

    Example::

        benchmark = split_by_class(train, test, ["ant", "bee", "cat", "dog"], 2, seed=0)
        benchmark.class_names[benchmark.classes_order[0]]

    :param train_dataset: map-style dataset of (image, label) with an attribute ``targets``.
    :param test_dataset: the same for testing.
    :param class_names: the name of each label.
    :param n_experiences: number of experiences; a divisor of the number of classes.
    :param seed: seed of the class order; None draws it from the global random state.
    :param fixed_class_order: labels in the order in which they arrive; overrides the drawn order.
    :param shuffle: whether to draw the order; if False, labels arrive in ascending order.
    :param return_task_id: if True, every experience has its own task label, else all have 0.
    :param train_transform: applied to the images of the train stream.
    :param eval_transform: applied to the images of the test stream.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``) and ``n_classes``.
    :raises ValueError: if ``n_experiences`` does not divide the classes, or the order lacks some.
    """
    _check_n_experiences(n_experiences, len(class_names))
    benchmark = nc_benchmark(
        train_dataset,
        test_dataset,
        n_experiences=n_experiences,
        task_labels=return_task_id,
        fixed_class_order=_class_order(len(class_names), seed, fixed_class_order, shuffle),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )
    benchmark.class_names = list(class_names)
    return benchmark


def _check_n_experiences(n_experiences: int, n_classes: int) -> None:
    if n_experiences >= 1 and n_classes % n_experiences == 0:
        return
    divisors = [n for n in range(1, n_classes + 1) if n_classes % n == 0]
    fitting = n_classes - n_classes % n_experiences if 1 <= n_experiences <= n_classes else 0
    fewer = f", or pass {fitting} of the class names as `classes=`" if fitting else ""
    raise ValueError(
        f"`n_experiences` should divide the {n_classes} classes evenly, but is {n_experiences}. "
        f"Use one of {', '.join(map(str, divisors))}{fewer}."
    )


def _class_order(
    n_classes: int, seed: int | None, fixed_class_order: Sequence[int] | None, shuffle: bool
) -> list[int]:
    if fixed_class_order is not None:
        order = [int(label) for label in fixed_class_order]
        if sorted(order) != list(range(n_classes)):
            raise ValueError(
                f"`fixed_class_order` should hold every label from 0 to {n_classes - 1} once, but "
                f"is {order}. Complete it, or pass `seed=` to draw an order."
            )
        return order
    if not shuffle:
        return list(range(n_classes))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    order = torch.randperm(n_classes, generator=generator).tolist()
    return order
