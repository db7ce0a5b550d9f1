"""What every class-incremental benchmark of this package does alike: deal out the classes."""

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
    """Avalanche's ``nc_benchmark``, with errors that say what to do and the names of the classes.

    The order of the classes is the one that ``nc_benchmark`` draws, but the global random state is
    left alone when there is a ``seed``. Labels are not remapped: a label means the same class in
    every order.

    :param train_dataset: map-style dataset of (image, label) with an attribute ``targets``.
    :param test_dataset: the same for testing.
    :param class_names: the name of each label.
    :param n_experiences: number of tasks; a divisor of the number of classes.
    :param seed: seed of the class order; None draws it from the global random state.
    :param fixed_class_order: labels in the order in which they arrive; overrides the drawing.
    :param shuffle: whether to draw the order; if False, labels arrive in ascending order.
    :param return_task_id: if True, every experience has a task label of its own, else all have 0.
    :param train_transform: acts on the images of the train stream.
    :param eval_transform: acts on the images of the test stream.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``) and ``n_classes``.
    """
    n_classes = len(class_names)
    if n_experiences < 1 or n_classes % n_experiences:
        divisors = [n for n in range(1, n_classes + 1) if n_classes % n == 0]
        fitting = n_classes - n_classes % n_experiences if 1 <= n_experiences <= n_classes else 0
        fewer = f", or pass {fitting} of the class names as `classes=`" if fitting else ""
        raise ValueError(
            f"`n_experiences` is {n_experiences}, which does not divide the {n_classes} classes "
            f"evenly. Use one of {', '.join(map(str, divisors))}{fewer}."
        )
    if fixed_class_order is not None:
        order = [int(label) for label in fixed_class_order]
        if sorted(order) != list(range(n_classes)):
            raise ValueError(
                f"`fixed_class_order` is {order}; it must hold every label from 0 to "
                f"{n_classes - 1} once."
            )
    elif shuffle:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        order = torch.randperm(n_classes, generator=generator).tolist()
    else:
        order = list(range(n_classes))
    benchmark = nc_benchmark(
        train_dataset,
        test_dataset,
        n_experiences=n_experiences,
        task_labels=return_task_id,
        fixed_class_order=order,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )
    benchmark.class_names = list(class_names)
    return benchmark
