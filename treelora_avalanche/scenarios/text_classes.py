"""Texts and their classes: class-incremental streams for encoders, as those of images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import GenericCLScenario, dataset_benchmark
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset

from treelora_avalanche.models.text_encoder import TextEncoder, encode_texts
from treelora_avalanche.scenarios.data.class_incremental import split_by_class
from treelora_avalanche.scenarios.data.text_records import Records
from treelora_avalanche.scenarios.text_tasks import read_tasks


def TextClasses(
    folder: str | Path,
    model: Any,
    n_experiences: int | None = None,
    *,
    tasks: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
    limit: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    max_length: int = 256,
) -> GenericCLScenario:
    """A folder of ``{"prompt": ..., "answer": ...}`` records, every answer a class.

    The layouts are those of :func:`~treelora_avalanche.scenarios.TextTasks`. A sample is the row of
    tokens of a prompt, and the number of its answer; equal answers are one class, in whatever task.
    The task label is 0 everywhere.

    :param folder: the folder.
    :param model: the :class:`~treelora_avalanche.models.TextEncoder` that is to learn it, or its
        tokenizer: the benchmark tells how many classes the encoder needs.
    :param n_experiences: number of experiences over which the classes of all tasks together are
        dealt out, in an order drawn by ``seed``; a divisor of their number. By default there is one
        experience per task, with that task's classes.
    :param tasks: names of the tasks to use, in the order in which they arrive; by default all, in
        alphabetical order.
    :param order: another order, as places in that list.
    :param limit: the first so many records of each file; None for all.
    :param test_fraction: share of a task's records that is drawn for testing where it has one file.
    :param seed: seed of that drawing, and of the order of the classes.
    :param max_length: most tokens of a text, where ``model`` is a tokenizer.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``), ``n_classes`` and
        ``task_names``.
    :raises FileNotFoundError: if a file is missing.
    :raises ValueError: if a file does not hold such records, or an argument is out of range.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, and is {limit}.")
    tokenizer = model
    if isinstance(model, TextEncoder):
        tokenizer, max_length = model.tokenizer, model.max_length
    elif isinstance(model, torch.nn.Module) or not callable(model):
        raise ValueError(
            f"`model` is a {type(model).__name__}; pass what "
            "`treelora_avalanche.models.create_text_encoder` gives, or its tokenizer."
        )
    parts = [
        (name, train.first(limit), test.first(limit))
        for name, train, test in read_tasks(folder, tasks, order, test_fraction, seed)
    ]
    # In the order in which they arrive, so that classes and experiences go up together.
    answers = (record.answer for _, train, test in parts for record in (*train[1], *test[1]))
    class_names = list(dict.fromkeys(answers))
    label_of = {name: label for label, name in enumerate(class_names)}

    def dataset(*records: Records) -> Any:
        found = list(chain(*(part.records for part in records)))
        rows = encode_texts(tokenizer, [record.prompt for record in found], max_length)
        labels = torch.tensor([label_of[record.answer] for record in found])
        return _make_taskaware_tensor_classification_dataset(rows, labels, task_labels=0)

    benchmark: GenericCLScenario
    if n_experiences is not None:
        benchmark = split_by_class(
            dataset(*(train for _, train, _ in parts)),
            dataset(*(test for _, _, test in parts)),
            class_names,
            n_experiences,
            seed=seed,
        )
    else:
        benchmark = dataset_benchmark(
            [dataset(train) for _, train, _ in parts], [dataset(test) for _, _, test in parts]
        )
        benchmark.class_names = class_names
        benchmark.n_classes = len(class_names)
    benchmark.task_names = [name for name, _, _ in parts]
    return benchmark
