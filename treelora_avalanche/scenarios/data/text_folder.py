"""A user's folder of text tasks: which tasks it holds, and their records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from treelora_avalanche.choices import check_known
from treelora_avalanche.scenarios.data.names import entries
from treelora_avalanche.scenarios.data.text_records import SUFFIXES, Records, read_records

PARTS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Names of files that are usually parts of one task."""


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
    folder: str | Path,
    tasks: Sequence[str] | None,
    order: Sequence[int] | None,
    test_fraction: float,
    seed: int,
) -> list[tuple[str, Records, Records]]:
    """Returns the names of a folder's tasks, with their records for training and testing.

    :param folder: holds ``<task>/train.json`` with ``<task>/test.json``, or ``<task>.json``; or
        the same with the suffix ``.jsonl``.
    :param tasks: names of the tasks to use, in order of arrival; None for all, sorted by name.
    :param order: positions in that list, to change the order.
    :param test_fraction: share of a task's records that is drawn for testing if it has one file.
    :param seed: seed of that draw.
    :raises FileNotFoundError: if the folder or a file is missing.
    :raises ValueError: if there are no such tasks, if two files could be the same task, or if
        files do not hold such records.
    """
    root = Path(folder).expanduser()
    found = dict(_task_files(root))
    if not found:
        raise ValueError(
            f"`folder` {str(root)!r} holds no tasks; put <task>.json or <task>.jsonl there, or "
            "<task>/train.json with <task>/test.json."
        )
    names = sorted(found) if tasks is None else list(tasks)
    for name in names:
        check_known("task in `tasks`", name, found)
    return [
        (name, *_read_parts(found[name], test_fraction, seed))
        for name in ordered_tasks(names, order)
    ]


def _task_files(root: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yields the names of tasks with their one file, or their files for training and testing."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"`folder` should be a folder of tasks, but {str(root)!r} is not a folder."
        )
    _check_root(root)
    for path in entries(root):
        if path.is_file() and path.suffix in SUFFIXES:
            yield path.stem, [path]
        elif path.is_dir():
            parts = {part: _one_file(path, part) for part in ("train", "test")}
            if any(parts.values()):
                yield path.name, [f or path / f"{part}.json" for part, f in parts.items()]


def _check_root(root: Path) -> None:
    """Raises an error if files could be several tasks, or parts of one."""
    files = {path.name: path for path in entries(root) if path.suffix in SUFFIXES}
    names = [path.stem for path in files.values()]
    parts = [name for name in names if name in PARTS]
    if "train" in parts and len(set(parts)) > 1:
        raise ValueError(
            f"`folder` {str(root)!r} holds {', '.join(files)} itself, which would become tasks "
            f"called {', '.join(dict.fromkeys(parts))}. If they are the parts of one task, move "
            "them to a subfolder with the name of the task; the records for testing are read from "
            "test.json or test.jsonl."
        )
    for path in files.values():
        twins = [name for name in files if name != path.name and Path(name).stem == path.stem]
        if (root / path.stem).is_dir():
            twins.append(f"{path.stem}/")
        if twins:
            raise ValueError(
                f"`folder` {str(root)!r} holds {path.name} and {', '.join(twins)}, which would "
                f"both be the task {path.stem!r}. Rename or remove one."
            )


def _one_file(folder: Path, part: str) -> Path | None:
    """Returns the file of one part of a task."""
    found = [folder / f"{part}{s}" for s in SUFFIXES if (folder / f"{part}{s}").is_file()]
    if len(found) > 1:
        raise ValueError(
            f"{str(folder)!r} holds {' and '.join(f.name for f in found)}, of which only one can "
            f"be the records for {part}ing. Remove the other."
        )
    return found[0] if found else None


def _read_parts(files: list[Path], test_fraction: float, seed: int) -> tuple[Records, Records]:
    """Returns the records for training and for testing, drawn if there is one file."""
    if len(files) == 2:
        return read_records(files[0]), read_records(files[1])
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"`test_fraction` should be between 0 and 1, but is {test_fraction}. The usual share "
            "is 0.2."
        )
    file, records = read_records(files[0])
    if len(records) < 2:
        raise ValueError(
            f"{file} has a single record, but a training and a test set need two. Add records, or "
            "give a test set as a file of its own."
        )
    n_test = min(max(round(test_fraction * len(records)), 1), len(records) - 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = set(torch.randperm(len(records), generator=generator)[:n_test].tolist())
    return (
        Records(file, [record for i, record in enumerate(records) if i not in drawn]),
        Records(file, [record for i, record in enumerate(records) if i in drawn]),
    )
