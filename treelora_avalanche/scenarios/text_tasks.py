"""Streams of text tasks from a user's folder of prompts and answers, for language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avalanche.benchmarks import CLScenario

from treelora_avalanche.choices import TEXT_METRICS, check_known
from treelora_avalanche.scenarios.data.text_benchmark import TextTask, text_benchmark
from treelora_avalanche.scenarios.data.text_folder import read_tasks


def TextTasks(
    folder: str | Path,
    model: Any,
    *,
    tasks: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
    metric: str | Mapping[str, str] = "rouge_l",
    max_new_tokens: int | Mapping[str, int] = 128,
    limit: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    max_length: int = 1024,
) -> CLScenario:
    """Returns a folder of ``{"prompt": ..., "answer": ...}`` records as a stream of text tasks.

    Two layouts are accepted, also in one folder: ``<folder>/<task>/train.json`` with
    ``<folder>/<task>/test.json``; and ``<folder>/<task>.json``, from which a test set is drawn.
    Files are JSON, a list of records, or JSONL, one record per line, in UTF-8. Other usual keys are
    listed at :func:`~treelora_avalanche.scenarios.data.text_records.read_records`. The attributes
    of an experience are listed at
    :func:`~treelora_avalanche.scenarios.data.text_benchmark.text_benchmark`.

    Example::

        model = create_language_model("gpt2")
        benchmark = TextTasks("my_tasks", model, metric={"sums": "accuracy"})
        for experience in benchmark.train_stream:
            print(experience.task_name, len(experience.prompts))

    :param folder: the folder.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` to train, or a tokenizer.
    :param tasks: names of the tasks to use, in order of arrival; by default all, sorted by name.
    :param order: positions in that list, from 0, to change the order.
    :param metric: scores generated answers, a name in
        :data:`~treelora_avalanche.choices.TEXT_METRICS`; one for all tasks, or by task name.
    :param max_new_tokens: limit of a generated answer; one for all tasks, or by task name.
    :param limit: number of records used of each file, from its start; None for all.
    :param test_fraction: share of a task's records that is drawn for testing if it has one file.
    :param seed: seed of that draw.
    :param max_length: limit of the tokens of a prompt and its answer if ``model`` is a tokenizer.
    :return: the benchmark; it carries ``task_names``.
    :raises FileNotFoundError: if a file is missing.
    :raises ValueError: if a file does not hold such records; the error names file and record.
    """
    built = []
    for name, train, test in read_tasks(folder, tasks, order, test_fraction, seed):
        one_metric = metric if isinstance(metric, str) else metric.get(name, "rouge_l")
        check_known("`metric`", one_metric, TEXT_METRICS)
        length = (
            max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens.get(name, 128)
        )
        built.append(TextTask(name, train, test, one_metric, length))
    return text_benchmark(built, model, limit=limit, max_length=max_length)
