"""Cells of a comparison, and their progress lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as LiveLines

from treelora_avalanche.plugins import NonFiniteLossError
from treelora_avalanche.runs import Progress


@dataclass
class Cell:
    """One run of a comparison.

    >>> for cell in compare(["TreeLoRA"], [0, 1], settings, "runs/compare"):
    ...     print(cell.method, cell.seed, cell.folder, cell.error)

    :param method: name of the method.
    :param seed: the run's seed.
    :param config: from :func:`~treelora_avalanche.runs.resolve_config`.
    :param folder: the run folder.
    :param results: content of ``results.json``; None if the run failed.
    :param error: one line on the error, if the run failed.
    :param reused: whether the run was finished before.
    :param row: name of its row; by default the method.
    """

    method: str
    seed: int
    config: dict[str, Any]
    folder: Path
    results: dict[str, Any] | None = None
    error: str | None = None
    reused: bool = False
    row: str = ""

    def __post_init__(self) -> None:
        self.row = self.row or self.method

    @property
    def diverged(self) -> bool:
        """Whether the run failed because its loss became NaN or infinite."""
        return (self.error or "").startswith(NonFiniteLossError.__name__)


class MethodLines:
    """Progress lines, one per method; outside of a terminal, one printed line per finished run.

    >>> lines = MethodLines(["TreeLoRA", "SeqLoRA"], n_seeds=3, console=Console(stderr=True))
    >>> with lines.live:
    ...     lines.begin("TreeLoRA", "starting")

    :param methods: names of the methods.
    :param n_seeds: number of runs per method.
    :param console: the console to print to.
    :param live: whether to show progress during runs.
    :param measure: short name of the final score.
    """

    def __init__(
        self,
        methods: Sequence[str],
        n_seeds: int,
        console: Console,
        *,
        live: bool = True,
        measure: str = "acc",
    ):
        self.n_seeds = n_seeds
        self.measure = measure
        self.console = console
        self.live = LiveLines(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TextColumn("{task.fields[busy]:5.0f} s"),
            console=console,
            disable=not (live and console.is_terminal),
        )
        self.lines: dict[str, TaskID] = {}
        self.done = dict.fromkeys(methods, 0)
        self.busy = dict.fromkeys(methods, 0.0)
        self.begun = 0.0
        width = max(len(method) for method in methods)
        for method in methods:
            self.lines[method] = self.live.add_task(
                method.ljust(width), total=1, state="waiting", busy=0.0
            )

    def begin(self, method: str, state: str) -> None:
        """Starts the clock of a method, and shows a state.

        :param method: name of the method.
        :param state: short text.
        """
        # One clock per method: between two seeds of one, the other methods run.
        self.begun = time.monotonic() - self.busy[method]
        self.live.update(self.lines[method], state=state)

    def step(self, method: str, now: Progress) -> None:
        """Shows the progress of a run; called after every training step.

        :param method: name of the method.
        :param now: progress of the run.
        """
        if self.live.disable:
            return
        percent = "" if now.accuracy is None else f"  {self.measure} {100 * now.accuracy:5.1f} %"
        done = self.done[method]
        self.busy[method] = time.monotonic() - self.begun
        self.live.update(
            self.lines[method],
            busy=self.busy[method],
            total=self.n_seeds * now.n_steps,
            completed=done * now.n_steps + now.step,
            state=f"seed {done + 1}/{self.n_seeds}  task {now.task}/{now.n_tasks}  "
            f"epoch {now.epoch}/{now.n_epochs}{percent}",
        )

    def note(self, cell: Cell, text: str) -> None:
        """Prints a permanent line about a cell.

        :param cell: the cell.
        :param text: the line.
        """
        self.console.print(
            f"{cell.row}, seed {cell.seed}: {escape(text)}", soft_wrap=True, highlight=False
        )

    def finish(self, cell: Cell) -> None:
        """Shows the result of a cell.

        :param cell: the finished or failed cell.
        """
        self.done[cell.row] += 1
        line = self.lines[cell.row]
        if cell.results is None:
            self.console.print(
                f"[red]failed[/red]  {cell.row}, seed {cell.seed}: {escape(cell.error or '')}",
                soft_wrap=True,
                highlight=False,
            )
            self.live.update(line, state=f"[red]seed {cell.seed} failed")
        else:
            accuracy = next(iter(cell.results["metrics"].values()))["overall_performance"]
            note = "finished before" if cell.reused else "done"
            state = f"{note}, {self.measure} {100 * accuracy:.1f} %"
            self.live.update(line, state=state)
            if self.live.disable:
                self.console.print(f"{cell.row}, seed {cell.seed}: {state}", highlight=False)
        self.live.update(line, total=self.n_seeds, completed=self.done[cell.row])
