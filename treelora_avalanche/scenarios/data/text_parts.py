"""Records of a user's text tasks, for training and testing, from files or data sets in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from treelora_avalanche.choices import check_known
from treelora_avalanche.scenarios.data.overlap import check_text_overlap
from treelora_avalanche.scenarios.data.text_files import RawRecord
from treelora_avalanche.scenarios.data.text_folder import PARTS, task_files
from treelora_avalanche.scenarios.data.text_records import Records, as_records, read_records

Reader = Callable[[], Records]


def ordered_tasks(names: Sequence[str], order: Sequence[int] | None) -> list[str]:
    """Returns names of tasks in the order in which they arrive.

    >>> ordered_tasks(["sums", "poems"], [1, 0])
    ['poems', 'sums']

    :param names: the names.
    :param order: positions in that list, each once; None keeps its order.
    :raises ValueError: if the names repeat, or the order is not a permutation.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(
            f"`tasks` should be a list of different task names, but is {names!r}. Name each task "
            "once."
        )
    if order is None:
        return list(names)
    if sorted(order) != list(range(len(names))):
        raise ValueError(
            f"`order` should hold every number from 0 to {len(names) - 1} once, but is "
            f"{list(order)}. The numbers are the positions of {', '.join(names)}."
        )
    return [names[position] for position in order]


def read_tasks(
    source: str | Path | Mapping[str, Any],
    tasks: Sequence[str] | None,
    order: Sequence[int] | None,
    test_fraction: float,
    seed: int,
    keys: Mapping[str, str] | None = None,
    allow_overlap: bool = False,
) -> list[tuple[str, Records, Records]]:
    """Returns the names of a user's tasks, with their records for training and testing.

    :param source: the folder of
        :func:`~treelora_avalanche.scenarios.data.text_folder.task_files`; or the data set of each
        task by name, see :func:`read_split`: a mapping with the splits ``train`` and ``test``, or
        one from which a test set is drawn.
    :param tasks: names of the tasks to use, in order of arrival; None for all, sorted by name, or
        in the order of the mapping.
    :param order: positions in that list, to change the order.
    :param test_fraction: share of a task's records that is drawn for testing if it has one file.
    :param seed: seed of that draw.
    :param keys: the records' own names of the keys that
        :func:`~treelora_avalanche.scenarios.data.text_records.read_records` lists.
    :param allow_overlap: whether a record may be for training and for testing.
    :raises FileNotFoundError: if the folder or a file is missing.
    :raises ValueError: if there are no such tasks, if records are not as expected, or if a record
        for testing is one for training.
    """
    found: dict[str, list[Reader]]
    if isinstance(source, Mapping):
        found = dict(_readers(source, keys))
        names = list(found) if tasks is None else list(tasks)
    else:
        files = task_files(Path(source).expanduser(), tasks)
        found = {n: [partial(read_records, f, keys) for f in parts] for n, parts in files.items()}
        names = sorted(found) if tasks is None else list(tasks)
    for name in names:
        check_known("task in `tasks`", name, found)
    return [
        (name, *_read_parts(name, found[name], test_fraction, seed, allow_overlap))
        for name in ordered_tasks(names, order)
    ]


def _readers(
    source: Mapping[str, Any], keys: Mapping[str, str] | None
) -> Iterator[tuple[str, list[Reader]]]:
    """Yields the name of each task with readers of its one split, or of train and test."""
    if not source:
        raise ValueError("`folder` should hold a data set for each task, but is empty.")
    if "train" in source and set(source) <= set(PARTS):
        raise ValueError(
            f"`folder` should be a mapping from tasks to data sets, but has the keys "
            f"{', '.join(source)}. If they are the splits of one task, pass "
            "`{'name of the task': splits}`."
        )
    for task, data in source.items():
        if not isinstance(data, Mapping):
            yield task, [partial(read_split, data, f"task {task!r}", keys)]
            continue
        if lacking := [split for split in ("train", "test") if split not in data]:
            raise ValueError(
                f"task {task!r} of `folder` should have the splits train and test, but lacks "
                f"{' and '.join(lacking)}; it has {', '.join(map(str, data)) or 'none'}. Pass "
                "`{'train': ..., 'test': ...}`, or one data set, from which a test set is drawn."
            )
        yield (
            task,
            [
                partial(read_split, data[split], f"the {split} split of task {task!r}", keys)
                for split in ("train", "test")
            ],
        )


def read_split(split: Any, name: str, keys: Mapping[str, str] | None = None) -> Records:
    """Returns the records of a ``datasets.Dataset``, or of a list of dictionaries.

    A ``ClassLabel`` is read as the name of its class.

    >>> read_split([{"prompt": "1 + 1 =", "answer": "2"}], "sums").records
    [TextRecord(prompt='1 + 1 =', answer='2')]

    :param split: the data set.
    :param name: its name, for errors.
    :param keys: the records' own names of the keys.
    :raises ValueError: if it does not hold such records; the error names split and record.
    """
    features = getattr(split, "features", None) or {}
    classes = {key: list(f.names) for key, f in features.items() if hasattr(f, "int2str")}
    raw = []
    for number, record in enumerate(split):
        place = f"record {number} of {name}"
        if not isinstance(record, Mapping):
            raise ValueError(
                f"{place} should be an object such as {{'prompt': ..., 'answer': ...}}, but is a "
                f"{type(record).__name__}."
            )
        named = {key: _class_name(record[key], classes[key], key, place) for key in classes}
        raw.append(RawRecord({**record, **named}, place))
    if not raw:
        raise ValueError(f"{name} should hold records, but holds none.")
    return Records(name, as_records(raw, keys))


def _class_name(label: int | None, names: Sequence[str], key: str, place: str) -> str | None:
    if label is None:
        return None
    if not 0 <= label < len(names):
        raise ValueError(
            f"{key!r} of {place} should be a class from 0 to {len(names) - 1}, but is {label}. "
            "Complete the record or remove it."
        )
    return names[label]


def _read_parts(
    task: str, readers: list[Reader], test_fraction: float, seed: int, allow_overlap: bool
) -> tuple[Records, Records]:
    """Returns the records for training and for testing, drawn if there is one file."""
    if len(readers) == 2:
        train, test = (read() for read in readers)
        numbers: tuple[Sequence[int], Sequence[int]] = (
            range(len(train.records)),
            range(len(test.records)),
        )
    else:
        file, records = readers[0]()
        numbers = _draw(file, len(records), test_fraction, seed)
        train, test = (Records(file, [records[i] for i in part]) for part in numbers)
    if not allow_overlap:
        check_text_overlap(task, (train, numbers[0]), (test, numbers[1]))
    return train, test


def _draw(
    file: Path | str, n_records: int, test_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Returns the numbers of the records for training, and of those drawn for testing."""
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"`test_fraction` should be between 0 and 1, but is {test_fraction}. The usual share "
            "is 0.2."
        )
    if n_records < 2:
        raise ValueError(
            f"{file} has a single record, but a training and a test set need two. Add records, or "
            "give a test set as a file of its own."
        )
    n_test = min(max(round(test_fraction * n_records), 1), n_records - 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = set(torch.randperm(n_records, generator=generator)[:n_test].tolist())
    train = [number for number in range(n_records) if number not in drawn]
    return train, sorted(drawn)
