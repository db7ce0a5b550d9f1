"""Class-incremental streams of texts, for text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import GenericCLScenario, dataset_benchmark
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset

from treelora_avalanche.models.text_encoder import TextEncoder, encode_texts
from treelora_avalanche.scenarios.data.class_incremental import divide_classes, split_by_class
from treelora_avalanche.scenarios.data.text_parts import read_tasks
from treelora_avalanche.scenarios.data.text_records import Records, check_limits


def TextClasses(
    folder: str | Path | Mapping[str, Any],
    model: Any,
    n_experiences: int | None = None,
    *,
    tasks: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
    limit: int | None = None,
    eval_limit: int | str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    max_length: int = 256,
    keys: Mapping[str, str] | None = None,
    allow_overlap: bool = False,
) -> GenericCLScenario:
    """Returns a folder of ``{"prompt": ..., "answer": ...}`` records; each answer is a class.

    The layouts are those of :func:`~treelora_avalanche.scenarios.TextTasks`. A sample is the token
    sequence of a prompt with the label of its answer; equal answers are one class across tasks. The
    task label is 0 everywhere.

    Example::

        tokenizer = AutoTokenizer.from_pretrained("distilbert-base-uncased")
        benchmark = TextClasses("my_tasks", tokenizer)
        model = create_text_encoder("distilbert-base-uncased", benchmark.n_classes)

    :param folder: the folder, or data sets by task name, as for
        :func:`~treelora_avalanche.scenarios.TextTasks`.
    :param model: the :class:`~treelora_avalanche.models.TextEncoder` to train, or its tokenizer;
        ``n_classes`` of the benchmark is the number of classes that the encoder needs.
    :param n_experiences: number of experiences among which the classes of all tasks are divided, in
        an order drawn by ``seed``; a divisor of their number. By default there is one experience
        per task, with the classes of that task.
    :param tasks: names of the tasks to use, in order of arrival; by default all, sorted by name, or
        in the order of the mapping.
    :param order: positions in that list, from 0, to change the order.
    :param limit: number of records used of each file, from its start; None for all.
    :param eval_limit: the same for testing, or ``"all"``; None for ``limit``.
    :param test_fraction: share of a task's records that is drawn for testing if it has one file.
    :param seed: seed of that draw, and of the order of the classes.
    :param max_length: limit of the tokens of a text if ``model`` is a tokenizer.
    :param keys: names of the keys of the prompt and the answer in the records, such as
        ``{"text": "sentence", "label": "topic"}``.
    :param allow_overlap: whether a record may be for training and for testing.
    :return: the benchmark; it carries ``class_names`` (``class_names[label]``), ``n_classes`` and
        ``task_names``.
    :raises FileNotFoundError: if a file is missing.
    :raises ValueError: if a file does not hold such records, ``limit`` is not positive, or
        ``n_experiences`` does not divide the classes.
    """
    limit, eval_limit = check_limits(limit, eval_limit)
    tokenizer, max_length = _tokenizer_of(model, max_length)
    parts = [
        (name, train.first(limit), test.first(eval_limit))
        for name, train, test in read_tasks(
            folder, tasks, order, test_fraction, seed, keys, allow_overlap
        )
    ]
    # In order of arrival, so that the labels of later experiences are larger.
    answers = (record.answer for _, train, test in parts for record in (*train[1], *test[1]))
    class_names = list(dict.fromkeys(answers))
    label_of = {name: label for label, name in enumerate(class_names)}

    def dataset(*records: Records) -> Any:
        found = list(chain(*(part.records for part in records)))
        tokens = encode_texts(tokenizer, [record.prompt for record in found], max_length)
        labels = torch.tensor([label_of[record.answer] for record in found])
        return _make_taskaware_tensor_classification_dataset(tokens, labels, task_labels=0)

    benchmark: GenericCLScenario
    if n_experiences is not None:
        benchmark = split_by_class(
            dataset(*(train for _, train, _ in parts)),
            dataset(*(test for _, _, test in parts)),
            class_names,
            divide_classes(class_names, n_experiences, seed=seed),
        )
    else:
        benchmark = dataset_benchmark(
            [dataset(train) for _, train, _ in parts], [dataset(test) for _, _, test in parts]
        )
        benchmark.class_names = class_names
        benchmark.n_classes = len(class_names)
    benchmark.task_names = [name for name, _, _ in parts]
    return benchmark


def _tokenizer_of(model: Any, max_length: int) -> tuple[Any, int]:
    """Returns the tokenizer and the limit of the tokens."""
    if isinstance(model, TextEncoder):
        return model.tokenizer, model.max_length
    if isinstance(model, torch.nn.Module) or not callable(model):
        raise ValueError(
            f"`model` should be a TextEncoder or a tokenizer, but is a {type(model).__name__}. "
            "Make one with `treelora_avalanche.models.create_text_encoder`."
        )
    return model, max_length
