"""Text tasks as an Avalanche benchmark: token sequences to train on, raw texts to generate from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.benchmarks import CLScenario, benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import TaskAwareSupervisedClassificationDataset

from treelora_avalanche.adapters import find_host
from treelora_avalanche.models.language import LanguageModel
from treelora_avalanche.models.token_datasets import as_avalanche_dataset
from treelora_avalanche.models.tokenization import encode_sample
from treelora_avalanche.scenarios.data.text_records import Records, check_limits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextTask:
    """One task of a stream.

    Example::

        sums = read_records(Path("sums.json"))
        TextTask("sums", train=sums, test=sums, metric="accuracy", max_new_tokens=8)

    :param name: name of the task.
    :param train: its records for training, with their file.
    :param test: the same for testing.
    :param metric: scores generated answers: a name in
        :data:`~treelora_avalanche.choices.TEXT_METRICS`.
    :param max_new_tokens: limit of a generated answer.
    """

    name: str
    train: Records
    test: Records
    metric: str
    max_new_tokens: int


def text_benchmark(
    tasks: Sequence[TextTask],
    model: Any,
    *,
    limit: int | None = None,
    eval_limit: int | str | None = None,
    max_length: int = 1024,
) -> CLScenario:
    """Returns an Avalanche benchmark of text tasks, one experience each.

    A sample is ``(x, y, 0)``: token ids padded with -1, targets that are -100 outside the answer,
    and the same task label everywhere, so that a strategy cannot read the task from it. Every
    experience carries ``task_name``, ``metric`` and ``max_new_tokens``, and the raw texts:
    ``prompts``, ``answers``, and ``sources`` if the metric is SARI (the whole prompts, as in
    TRACE), else None.

    Example::

        benchmark = text_benchmark([sums, poems], create_language_model("gpt2"))
        benchmark.train_stream[0].task_name

    :param tasks: the tasks, in order of arrival.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` to train, or a tokenizer.
    :param limit: number of records used of each file, from its start; None for all.
    :param eval_limit: the same for testing, or ``"all"``; None for ``limit``.
    :param max_length: limit of the tokens of a prompt and its answer if ``model`` is a tokenizer.
    :return: the benchmark; it carries ``task_names``.
    :raises ValueError: if there is nothing to learn, or the tokenizer cannot be used.
    """
    limits = dict(zip(("train", "test"), check_limits(limit, eval_limit), strict=True))
    if not tasks:
        raise ValueError("`tasks` should name at least one task, but is empty.")
    tokenizer, max_length = tokenizer_of(model, max_length)
    datasets: dict[str, list[Any]] = {"train": [], "test": []}
    for task in tasks:
        for name, records in (("train", task.train), ("test", task.test)):
            datasets[name].append(_encoded(records.first(limits[name]), tokenizer, max_length))
    benchmark = with_task_labels(benchmark_from_datasets(**datasets))
    for stream, name in ((benchmark.train_stream, "train"), (benchmark.test_stream, "test")):
        for experience, task in zip(stream, tasks, strict=True):
            records = getattr(task, name).first(limits[name]).records
            experience.task_name = task.name
            experience.prompts = [record.prompt for record in records]
            experience.answers = [record.answer for record in records]
            experience.metric = task.metric
            experience.sources = experience.prompts if task.metric == "sari" else None
            # A model with a short context must keep room for the prompt.
            experience.max_new_tokens = min(task.max_new_tokens, max_length // 2)
    benchmark.task_names = [task.name for task in tasks]
    return benchmark


def tokenizer_of(model: Any, max_length: int) -> tuple[Any, int]:
    """Returns the tokenizer and the limit of the tokens of a prompt and its answer.

    :param model: a :class:`~treelora_avalanche.models.LanguageModel`, which has its own limit, or
        a tokenizer.
    :param max_length: the limit if ``model`` is a tokenizer.
    :raises ValueError: if it is neither.
    """
    host = find_host(model) if isinstance(model, torch.nn.Module) else None
    if isinstance(host, LanguageModel):
        return host.tokenizer, host.max_length
    if isinstance(model, torch.nn.Module) or not callable(model):
        raise ValueError(
            "`model` should be a LanguageModel or a tokenizer, but is a "
            f"{type(model).__name__}. Make one with "
            "`treelora_avalanche.models.create_language_model`."
        )
    return model, max_length


def _encoded(
    records: Records, tokenizer: Any, max_length: int
) -> TaskAwareSupervisedClassificationDataset:
    samples = [encode_sample(tokenizer, r.prompt, r.answer, max_length) for r in records.records]
    n_shortened = sum(sample.n_dropped > 0 for sample in samples)
    if n_shortened:
        logger.info(
            "%s: the prompts of %d of %d records lose their beginnings, to fit into %d tokens",
            records.file,
            n_shortened,
            len(samples),
            max_length,
        )
    cut = [number for number, sample in enumerate(samples) if sample.n_cut]
    if cut:
        worst = max(cut, key=lambda number: samples[number].n_cut)
        logger.warning(
            "%s: the answers of %d of %d records do not fit into %d tokens and lose their ends "
            "(the first is record %d; the longest, record %d, loses %d tokens); raise max_length "
            "if the model allows it",
            records.file,
            len(cut),
            len(samples),
            max_length,
            cut[0],
            worst,
            samples[worst].n_cut,
        )
    # One column more than any sample needs: it marks sequences that are not cropped yet.
    return as_avalanche_dataset(samples, max_length)
