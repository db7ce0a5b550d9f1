"""Rows of final scores by task, with those of constant answers for comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

TaskRow = tuple[str, list[float]]
"""Name of a row, and its number for each task; NaN where undefined."""


def task_rows(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[TaskRow]:
    """Returns the final score on each task by method, then those of constant answers.

    A method's scores are means over its seeds. There are no rows for streams of images, nor where
    no task has few distinct answers.

    >>> task_rows(results, labels(results))[-1]
    ('chance', [0.3333333333333333, nan])

    :param results: contents of ``results.json`` files, of one stream of texts.
    :param names: name of each run's row.
    """
    constant = results[0]["stream"].get("constant_answers") or []
    if not any(constant):
        return []
    rows: list[TaskRow] = []
    for name in dict.fromkeys(names):
        own = [r for r, n in zip(results, names, strict=True) if n == name]
        final = [result["accuracy_matrix"]["generated"][-1] for result in own]
        rows.append((name, [_mean(scores) for scores in zip(*final, strict=True)]))
    for name, key in (("majority answer", "majority"), ("chance", "chance")):
        rows.append((name, [math.nan if of is None else of[key] for of in constant]))
    return rows


def task_cells(
    results: Sequence[dict[str, Any]], names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Returns the names of the tasks, and the rows as text, in percent; both empty without rows.

    :param results: see :func:`task_rows`.
    :param names: see :func:`task_rows`.
    """
    rows = task_rows(results, names)
    tasks = list(results[0]["stream"]["task_names"]) if rows else []
    shown = [
        [name, *("–" if math.isnan(value) else f"{100 * value:.1f}" for value in values)]
        for name, values in rows
    ]
    return tasks, shown


def _mean(scores: Sequence[float | None]) -> float:
    return statistics.fmean(math.nan if score is None else score for score in scores)


__all__ = ["TaskRow", "task_cells", "task_rows"]
