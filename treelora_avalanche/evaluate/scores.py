"""Scores of the harness before and after a stream, and their mean difference."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from treelora_avalanche.reports.grids import rich_grid
from treelora_avalanche.runs.folder import to_json, write_text


@dataclass(frozen=True)
class Score:
    """One metric of one task, before and after.

    >>> Score("piqa", "acc", True, before=0.75, after=0.5, main=True).delta
    -0.25

    :param task: name of the task or group.
    :param metric: name of the metric, with its filter unless there is none.
    :param higher_is_better: whether it is.
    :param before: score of the base model.
    :param after: score of the final model.
    :param main: whether it is the first metric of the task, and the task no part of a group that
        has a score itself; only then it counts in the mean over tasks.
    """

    task: str
    metric: str
    higher_is_better: bool
    before: float
    after: float
    main: bool

    @property
    def delta(self) -> float:
        """After - before."""
        return self.after - self.before


@dataclass(frozen=True)
class Comparison:
    """Scores of all tasks, see :class:`Score`.

    >>> Comparison.of(results_before, results_after).general_ability_delta

    :param scores: in the order of the harness.
    """

    scores: list[Score]

    @classmethod
    def of(cls, before: dict[str, Any], after: dict[str, Any]) -> Comparison:
        """Returns the comparison of two results of the harness, of the same tasks.

        :param before: results of the base model.
        :param after: results of the final model.
        """
        scores = []
        results = {**before["results"], **before.get("groups", {})}
        final = {**after["results"], **after.get("groups", {})}
        parts = _parts_of_scored_groups(before.get("group_subtasks", {}), results)
        for task, values in results.items():
            better = before["higher_is_better"].get(task, {})
            names = _metrics(values)
            for name in names:
                metric, _, of_filter = name.partition(",")
                scores.append(
                    Score(
                        task=task,
                        metric=metric if of_filter == "none" else f"{metric} ({of_filter})",
                        higher_is_better=better.get(metric) is not False,
                        before=float(values[name]),
                        after=float(final[task][name]),
                        main=name == names[0] and task not in parts,
                    )
                )
        return cls(scores)

    @property
    def main(self) -> list[Score]:
        """Scores that count in the mean: the first metric of each task, if higher is better."""
        return [score for score in self.scores if score.main and score.higher_is_better]

    @property
    def general_ability_delta(self) -> float | None:
        """General ability delta of TRACE, ``(1/n) sum_i (after_i - before_i)``.

        **Higher is better.** None without a task whose first metric is better if higher.
        """
        return statistics.fmean(score.delta for score in self.main) if self.main else None

    def table(self) -> Table:
        """Returns the table for a terminal."""
        lines = [
            [
                f"{score.task}: {score.metric} {'↑' if score.higher_is_better else '↓'}",
                f"{score.before:.4f}",
                f"{score.after:.4f}",
                f"{score.delta:+.4f}",
            ]
            for score in self.scores
        ]
        return rich_grid(["before", "after", "Δ"], lines, first="Task")

    def in_words(self) -> str:
        """Returns one line on the general ability delta."""
        delta = self.general_ability_delta
        if delta is None:
            return "No general ability Δ: no task has a score that is better if higher."
        tasks = f"{len(self.main)} task{'s' if len(self.main) > 1 else ''}"
        return f"General ability Δ ↑, mean over {tasks} of after - before: {delta:+.4f}"


def _metrics(values: dict[str, Any]) -> list[str]:
    """Returns the keys of scores, ``metric,filter``, among those of the harness."""
    return [name for name in values if "," in name and "_stderr," not in name]


def _parts_of_scored_groups(groups: dict[str, list[str]], results: dict[str, Any]) -> set[str]:
    """Returns the tasks and groups that are part of a group with a score of its own."""
    open_groups = [name for name in groups if _metrics(results.get(name, {}))]
    parts: set[str] = set()
    while open_groups:
        children = set(groups.get(open_groups.pop(), [])) - parts
        parts |= children
        open_groups += children
    return parts


def write_comparison(comparison: Comparison, config: dict[str, Any], folder: Path) -> None:
    """Writes ``harness.json``.

    :param comparison: the scores.
    :param config: configuration of the run.
    :param folder: the run folder.
    """
    content = {
        "schema_version": 1,
        "method": config["method"],
        "seed": config["seed"],
        "lm_eval": version("lm_eval"),
        "scores": [{**asdict(score), "delta": score.delta} for score in comparison.scores],
        "general_ability_delta": comparison.general_ability_delta,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_text(folder / "harness.json", to_json(content) + "\n")


__all__ = ["Comparison", "Score", "write_comparison"]
