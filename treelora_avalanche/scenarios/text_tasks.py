"""Streams of text tasks from a user's prompts and answers, for language models."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avalanche.benchmarks import CLScenario

from treelora_avalanche.choices import TEXT_METRICS, check_known
from treelora_avalanche.scenarios.data.text_benchmark import TextTask, text_benchmark, tokenizer_of
from treelora_avalanche.scenarios.data.text_parts import read_tasks
from treelora_avalanche.scenarios.data.text_records import Records
from treelora_avalanche.scenarios.data.text_scoring import Scoring, choose_scoring

logger = logging.getLogger(__name__)


def TextTasks(
    folder: str | Path | Mapping[str, Any],
    model: Any,
    *,
    tasks: Sequence[str] | None = None,
    order: Sequence[int] | None = None,
    metric: str | Mapping[str, str] | None = None,
    max_new_tokens: int | Mapping[str, int] | None = None,
    limit: int | None = None,
    eval_limit: int | str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    max_length: int = 1024,
    keys: Mapping[str, str] | None = None,
    allow_overlap: bool = False,
) -> CLScenario:
    """Returns a folder of ``{"prompt": ..., "answer": ...}`` records as a stream of text tasks.

    Two layouts are accepted, also in one folder: ``<folder>/<task>/train.json`` with
    ``<folder>/<task>/test.json``; and ``<folder>/<task>.json``, from which a test set is drawn.
    Files are JSON, a list of records; JSONL, one record per line; CSV, with a header and commas;
    all in UTF-8; or Parquet, which needs the extra ``parquet``. Other usual keys are listed at
    :func:`~treelora_avalanche.scenarios.data.text_records.read_records`. The attributes of an
    experience are listed at
    :func:`~treelora_avalanche.scenarios.data.text_benchmark.text_benchmark`.

    Without ``metric`` and ``max_new_tokens``, a task whose training answers are few, short and
    repeated is scored by exact match, up to the longest of them; others by ROUGE-L, up to 128
    tokens (:func:`~treelora_avalanche.scenarios.data.text_scoring.choose_scoring`).

    Example::

        model = create_language_model("gpt2")
        benchmark = TextTasks("my_tasks", model, metric={"sums": "accuracy"})
        for experience in benchmark.train_stream:
            print(experience.task_name, len(experience.prompts))
        TextTasks({"reviews": datasets.load_dataset("imdb")}, model)

    :param folder: the folder; or a data set for each task by name: a ``datasets.DatasetDict``, or
        another mapping with the splits ``train`` and ``test``; or one ``datasets.Dataset`` or list
        of records, from which a test set is drawn.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` to train, or a tokenizer.
    :param tasks: names of the tasks to use, in order of arrival; by default all, sorted by name, or
        in the order of the mapping.
    :param order: positions in that list, from 0, to change the order.
    :param metric: scores generated answers, a name in
        :data:`~treelora_avalanche.choices.TEXT_METRICS`; one for all tasks, or by task name; chosen
        from the training answers where it is not given.
    :param max_new_tokens: limit of a generated answer; one for all tasks, or by task name; chosen
        from the training answers where it is not given.
    :param limit: number of records used of each file, from its start; None for all.
    :param eval_limit: the same for testing, or ``"all"``; None for ``limit``.
    :param test_fraction: share of a task's records that is drawn for testing if it has one file.
    :param seed: seed of that draw.
    :param max_length: limit of the tokens of a prompt and its answer if ``model`` is a tokenizer.
    :param keys: names of the keys of the prompt and the answer in the records, such as
        ``{"prompt": "question", "answer": "reply"}``.
    :param allow_overlap: whether a record may be for training and for testing.
    :return: the benchmark; it carries ``task_names``.
    :raises FileNotFoundError: if a file is missing.
    :raises ValueError: if a file does not hold such records, or a record for testing is one for
        training; the error names file and record.
    """
    read = read_tasks(folder, tasks, order, test_fraction, seed, keys, allow_overlap)
    metrics = _by_task("`metric`", metric, read)
    lengths = _by_task("`max_new_tokens`", max_new_tokens, read)
    for one_metric in metrics.values():
        check_known("`metric`", one_metric, TEXT_METRICS)
    tokenizer, _ = tokenizer_of(model, max_length)
    built, chosen = [], []
    for name, train, test in read:
        if name in metrics and name in lengths:
            scoring = Scoring(metrics[name], lengths[name])
        else:
            choice = choose_scoring(train.records, tokenizer)
            scoring = Scoring(metrics.get(name, choice[0]), lengths.get(name, choice[1]))
            chosen.append(f"{name}: {scoring.metric}, {scoring.max_new_tokens} tokens")
        built.append(TextTask(name, train, test, *scoring))
    if chosen:
        logger.warning(
            "scores of generated answers, chosen from the training answers where `metric` and "
            "`max_new_tokens` are not given: %s",
            "; ".join(chosen),
        )
    return text_benchmark(built, model, limit=limit, eval_limit=eval_limit, max_length=max_length)


def _by_task(what: str, given: Any, read: Sequence[tuple[str, Records, Records]]) -> dict[str, Any]:
    """Returns the values that are given, by task."""
    names = [name for name, *_ in read]
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    for name in given:
        check_known(f"a task in {what}", name, names)
    return dict(given)
