"""Cells of a comparison, and their live lines."""

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

from treelora_avalanche.runs import Progress


@dataclass
class Cell:
    """One run of a comparison."""

    method: str
    seed: int
    config: dict[str, Any]
    folder: Path
    results: dict[str, Any] | None = None
    """ What its `results.json` holds; None where it failed. """
    error: str | None = None
    """ One line, where it failed. """
    reused: bool = False
    """ Whether it was finished before. """


class MethodLines:
    """One live line per method; where there is no terminal, one line per finished run."""

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
        """Say what happens on a line from now on."""
        # Its own clock: between two seeds of a method the others have their turn.
        self.begun = time.monotonic() - self.busy[method]
        self.live.update(self.lines[method], state=state)

    def step(self, method: str, now: Progress) -> None:
        """Move a line on; called at every training step."""
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
        """Say something of a cell that stays on the screen."""
        self.console.print(
            f"{cell.method}, seed {cell.seed}: {escape(text)}", soft_wrap=True, highlight=False
        )

    def finish(self, cell: Cell) -> None:
        """Close one cell of a line."""
        self.done[cell.method] += 1
        line = self.lines[cell.method]
        if cell.results is None:
            self.console.print(
                f"[red]failed[/red]  {cell.method}, seed {cell.seed}: {escape(cell.error or '')}",
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
                self.console.print(f"{cell.method}, seed {cell.seed}: {state}", highlight=False)
        self.live.update(line, total=self.n_seeds, completed=self.done[cell.method])
