"""O-LoRA's text classifications (Wang et al. 2023, arXiv 2310.14152) as streams of text tasks.

A prompt is an instruction, the possible labels, a text, and ``Answer:``; the answer is the label.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avalanche.benchmarks import CLScenario

from treelora_avalanche.choices import check_known
from treelora_avalanche.scenarios.data.text_benchmark import TextTask, text_benchmark
from treelora_avalanche.scenarios.data.text_files import read_file, read_utf8
from treelora_avalanche.scenarios.data.text_parts import ordered_tasks
from treelora_avalanche.scenarios.data.text_records import Records, TextRecord, text_of
from treelora_avalanche.scenarios.trace import TRACE_TASKS, trace_tasks

logger = logging.getLogger(__name__)

# The instructions are part of the benchmark: O-LoRA's paper lists them (appendix, "Task
# Instructions"). COPA's texts contain their question.
_INSTRUCTIONS = {
    "NLI": (
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? '
        "Choose one from the option.\n"
    ),
    "QQP": (
        'Whether the "first sentence" and the "second sentence" have the same meaning? '
        "Choose one from the option.\n"
    ),
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.\n",
    "TC": "What is the topic of the following paragraph? Choose one from the option.\n",
    "BoolQA": (
        "According to the following passage, is the question true or false? "
        "Choose one from the option.\n"
    ),
    "MultiRC": (
        "According to the following passage and question, is the candidate answer true or false? "
        "Choose one from the option.\n"
    ),
    "WiC": (
        "Given a word and two sentences, whether the word is used with the same sense in both "
        "sentence? Choose one from the option.\n"
    ),
    "COPA": None,
}

FAMILY_OF = {
    "yelp": "SC",
    "amazon": "SC",
    "IMDB": "SC",
    "SST-2": "SC",
    "agnews": "TC",
    "dbpedia": "TC",
    "yahoo": "TC",
    "MNLI": "NLI",
    "CB": "NLI",
    "RTE": "NLI",
    "QQP": "QQP",
    "BoolQA": "BoolQA",
    "MultiRC": "MultiRC",
    "WiC": "WiC",
    "COPA": "COPA",
}
"""The family of each of the fifteen tasks, which gives its instruction and its folder."""

O_LORA_ORDERS = {
    1: ("dbpedia", "amazon", "yahoo", "agnews"),
    2: ("dbpedia", "amazon", "agnews", "yahoo"),
    3: ("yahoo", "amazon", "agnews", "dbpedia"),
    4: (
        *("MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB"),
        *("yelp", "amazon", "SST-2", "dbpedia", "agnews", "MultiRC", "yahoo"),
    ),
    5: (
        *("MultiRC", "BoolQA", "WiC", "MNLI", "CB", "COPA", "QQP", "RTE"),
        *("IMDB", "SST-2", "dbpedia", "agnews", "yelp", "amazon", "yahoo"),
    ),
    6: (
        *("yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB"),
        *("SST-2", "dbpedia", "agnews", "yahoo", "MultiRC", "BoolQA", "WiC"),
    ),
}
"""O-LoRA's orders of four tasks (1 to 3) and of fifteen (4 to 6)."""

LONG_SEQUENCE = (
    *TRACE_TASKS,
    *("dbpedia", "amazon", "yahoo", "agnews", "yelp", "BoolQA", "QQP"),
)
"""The fifteen tasks of TreeLoRA's long sequence: TRACE's, then seven of O-LoRA's."""

MAX_NEW_TOKENS = 50
"""Limit of a generated label, as in O-LoRA's release."""

_NO_LABEL = "-"  # in MNLI, if the annotators did not agree


def OLoRAOrder(
    order: int,
    data_root: str | Path,
    model: Any,
    *,
    tasks: Sequence[str] | None = None,
    skip_missing_tasks: bool = False,
    limit: int | None = None,
    eval_limit: int | str | None = None,
    max_length: int = 1024,
) -> CLScenario:
    """Returns O-LoRA's text classifications in one of its six orders, :data:`O_LORA_ORDERS`.

    Reads the layout of the release, ``<family>/<task>/{train,test,labels}.json``. Yelp and Yahoo
    are part of every order (of 1 to 3, Yahoo alone), and their terms forbid redistribution, so that
    a copy of the data may lack them. The attributes of an experience are listed at
    :func:`~treelora_avalanche.scenarios.data.text_benchmark.text_benchmark`.

    Example::

        benchmark = OLoRAOrder(1, "data", create_language_model("gpt2"), skip_missing_tasks=True)

    :param order: 1 to 3, four tasks each; 4 to 6, fifteen tasks each.
    :param data_root: the folder that contains ``CL_Benchmark``, or that folder itself.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` to train, or a tokenizer.
    :param tasks: names of the tasks of that order to use, in order of arrival; by default all, in
        that order.
    :param skip_missing_tasks: whether to leave out missing tasks; results are then not comparable
        with O-LoRA's.
    :param limit: number of records used of each file, from its start; None for all.
    :param eval_limit: the same for testing, or ``"all"``; None for ``limit``.
    :param max_length: limit of the tokens of a prompt and its answer if ``model`` is a tokenizer.
    :return: the benchmark; it carries ``task_names``.
    :raises FileNotFoundError: if tasks are missing.
    :raises ValueError: if ``order`` or a task is unknown, or a file does not hold such records.
    """
    if order not in O_LORA_ORDERS:
        raise ValueError(f"`order` should be one of O-LoRA's orders, 1 to 6, but is {order!r}.")
    names = O_LORA_ORDERS[order] if tasks is None else ordered_tasks(tasks, None)
    for name in names:
        check_known(f"task in `tasks` of order {order}", name, O_LORA_ORDERS[order])
    names = _present(data_root, names, skip_missing_tasks)
    built = classification_tasks(data_root, names)
    return text_benchmark(built, model, limit=limit, eval_limit=eval_limit, max_length=max_length)


def LongSequence(
    data_root: str | Path,
    model: Any,
    variant: str = "500",
    *,
    skip_missing_tasks: bool = False,
    limit: int | None = None,
    eval_limit: int | str | None = None,
    max_length: int = 1024,
) -> CLScenario:
    """Returns TreeLoRA's sequence of fifteen tasks (Table 9): TRACE's, then seven of O-LoRA's.

    Example::

        benchmark = LongSequence("data", create_language_model("gpt2"), skip_missing_tasks=True)

    :param data_root: the folder that contains both ``TRACE-Benchmark`` and ``CL_Benchmark``.
    :param model: the :class:`~treelora_avalanche.models.LanguageModel` to train, or a tokenizer.
    :param variant: records per task of TRACE: ``"500"``, as in TreeLoRA, ``"1000"`` or ``"5000"``.
    :param skip_missing_tasks: whether to leave out missing tasks of O-LoRA, such as Yelp and Yahoo;
        results are then not comparable with TreeLoRA's.
    :param limit: number of records used of each file, from its start; None for all.
    :param eval_limit: the same for testing, or ``"all"``; None for ``limit``.
    :param max_length: limit of the tokens of a prompt and its answer if ``model`` is a tokenizer.
    :return: the benchmark; it carries ``task_names``.
    :raises FileNotFoundError: if tasks are missing.
    :raises ValueError: if a file does not hold such records.
    """
    names = _present(data_root, LONG_SEQUENCE[len(TRACE_TASKS) :], skip_missing_tasks)
    built = [
        *trace_tasks(data_root, variant, TRACE_TASKS),
        *classification_tasks(data_root, names),
    ]
    return text_benchmark(built, model, limit=limit, eval_limit=eval_limit, max_length=max_length)


def classification_tasks(data_root: str | Path, names: Sequence[str]) -> list[TextTask]:
    """Returns tasks of O-LoRA with their records.

    :param data_root: the folder that contains ``CL_Benchmark``, or that folder itself.
    :param names: the tasks, in order of arrival.
    :raises FileNotFoundError: if a file is missing.
    :raises ValueError: if a task is unknown, or a file does not hold ``{"label", "sentence"}``
        records.
    """
    root = _root(data_root)
    built = []
    for name in names:
        check_known("task", name, FAMILY_OF)
        folder = root / FAMILY_OF[name] / name
        labels = _labels(folder / "labels.json")
        train = _records(folder / "train.json", FAMILY_OF[name], labels)
        test = _records(folder / "test.json", FAMILY_OF[name], labels)
        built.append(TextTask(name, train, test, "accuracy", MAX_NEW_TOKENS))
    return built


def _root(data_root: str | Path) -> Path:
    root = Path(data_root).expanduser()
    return root / "CL_Benchmark" if (root / "CL_Benchmark").is_dir() else root


def _present(data_root: str | Path, names: Sequence[str], skip: bool) -> list[str]:
    """Returns the tasks that the data contain."""
    root = _root(data_root)
    present = [name for name in names if (root / FAMILY_OF[name] / name).is_dir()]
    missing = [name for name in names if name not in present]
    if not present:
        raise FileNotFoundError(
            f"`data_root` {str(root)!r} holds none of O-LoRA's tasks (<family>/<task>/train.json, "
            f"such as {FAMILY_OF[names[0]]}/{names[0]}). Get them from "
            "https://github.com/cmnfriend/O-LoRA."
        )
    if missing and not skip:
        raise FileNotFoundError(
            f"{root} lacks {', '.join(missing)} (Yelp and Yahoo may not be redistributed: get them "
            "from their owners); pass `skip_missing_tasks=True` to continue with the other "
            f"{len(present)}, whose results are not comparable with published ones."
        )
    if missing:
        logger.warning("leaving out %s, which %s lacks", ", ".join(missing), root)
    return present


def _labels(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; it lists the possible labels of the task.")
    labels = json.loads(read_utf8(file))
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f'{file} should hold a list of labels such as ["yes", "no"].')
    return labels


def _records(file: Path, family: str, labels: Sequence[str]) -> Records:
    instruction = _INSTRUCTIONS[family]
    before = "" if instruction is None else f"{instruction}Option: {', '.join(labels)} \n"
    records = []
    for record, place in read_file(file):
        label = text_of(record, "label", place)
        if label == _NO_LABEL:
            continue
        check_known(f"label in {place}", label, labels)
        sentence = text_of(record, "sentence", place)
        records.append(TextRecord(f"{before}{sentence}\nAnswer:", label))
    return Records(file, records)
