"""Many methods and seeds side by side, on the same streams and backbones.

Every cell (method, seed) has its run folder, named after its configuration. Cells that are finished
are not run again, and an interrupted one continues; a cell that fails leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from treelora_avalanche.compare.cells import Cell, MethodLines
from treelora_avalanche.compare.executors import attempt, attempt_all, settings_of_jobs
from treelora_avalanche.registry import METHODS, RegistrationError, RunSettings, check_models
from treelora_avalanche.runs import (
    Ingredients,
    check_arguments,
    finished_results,
    prepare,
    resolve_config,
    run,
    run_name,
)


def compare(
    methods: Sequence[str],
    seeds: Sequence[int],
    settings: RunSettings,
    output: Path | str,
    *,
    console: Console | None = None,
    executor: str | None = None,
    executor_options: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Run every method with every seed, or take what is finished.

    :param methods: names of the methods, in the order of the table.
    :param seeds: seeds; all methods meet the same stream and the same backbone under a seed.
    :param settings: the settings, the same for all methods.
    :param output: folder of the run folders.
    :param console: where the live lines go; by default to standard error.
    :param executor: where cells run, several at a time: ``"processes"`` or ``"slurm"``, see
        :func:`~treelora_avalanche.compare.executors.attempt_all`; by default one after the other.
    :param executor_options: of the executor.
    :return: one cell per method and seed, failed ones included.
    :raises ValueError: before anything is run, if a name is unknown, the data cannot be used, or a
        method cannot be built with these settings.
    """
    methods, seeds = list(dict.fromkeys(methods)), list(dict.fromkeys(seeds))
    if not methods or not seeds:
        raise ValueError("`--methods` and `--seeds` should name at least one each")
    broken = _broken(methods)
    usable = [method for method in methods if method not in broken]
    check_models(usable, settings)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`--output` should be a folder, but {output} is a file")

    executor_options = executor_options or {}
    if executor is not None:
        settings = settings_of_jobs(settings, executor, executor_options)
    elif executor_options:
        raise ValueError("`--executor_options` are given, but no `--executor`; choose one")

    def cell_of(method: str, seed: int) -> Cell:
        config = resolve_config(method, seed, settings, elsewhere=executor == "slurm")
        return Cell(method, seed, config, output / run_name(config))

    cells = [cell_of(method, seed) for method in usable for seed in seeds]
    console = console or Console(stderr=True)
    for reason in broken.values():
        console.print(f"failed  {escape(reason)}", soft_wrap=True, highlight=False)
    failed = [
        Cell(method, seed, {}, output, error=reason)
        for method, reason in broken.items()
        for seed in seeds
    ]
    if not usable:
        return failed
    lines = MethodLines(usable, len(seeds), console, measure=_measure(settings))
    if executor is not None:
        with lines.live:
            _run_elsewhere(cells, settings, executor, executor_options, output, lines)
        return cells + failed
    checked = False
    with lines.live:
        # Seed by seed, so that one stream and backbone at a time is in memory.
        for seed in seeds:
            ingredients: Ingredients | None = None
            for cell in (cell for cell in cells if cell.seed == seed):
                cell.results = finished_results(cell.folder, cell.config)
                cell.reused = cell.results is not None
                if cell.results is None:
                    if ingredients is None:
                        lines.begin(cell.method, "preparing data and backbone")
                        ingredients = prepare(seed, settings)
                        if not checked:
                            missing = [c.method for c in cells if not _is_finished(c)]
                            check_arguments(list(dict.fromkeys(missing)), settings, ingredients)
                            checked = True
                    lines.begin(cell.method, "starting")
                    _run_cell(cell, settings, ingredients, lines)
                lines.finish(cell)
    return cells + failed


def _broken(methods: Sequence[str]) -> dict[str, str]:
    """Methods of other packages that cannot be loaded, and why."""
    reasons = {}
    for method in methods:
        try:
            METHODS[method]
        except RegistrationError as error:
            reasons[method] = str(error)
    return reasons


def _measure(settings: RunSettings) -> str:
    """What a run is judged by, in short."""
    return "Op" if settings.on_language else "acc"


def _is_finished(cell: Cell) -> bool:
    return finished_results(cell.folder, cell.config) is not None


def _run_cell(
    cell: Cell, settings: RunSettings, ingredients: Ingredients, lines: MethodLines
) -> None:
    cell.error = attempt(
        cell.method,
        cell.seed,
        settings,
        cell.folder,
        ingredients=ingredients,
        progress=lambda now: lines.step(cell.method, now),
        note=lambda text: lines.note(cell, text),
    )
    cell.results = finished_results(cell.folder, cell.config)


def _run_elsewhere(
    cells: Sequence[Cell],
    settings: RunSettings,
    executor: str,
    options: Mapping[str, Any],
    output: Path,
    lines: MethodLines,
) -> None:
    missing = []
    for cell in cells:
        cell.results = finished_results(cell.folder, cell.config)
        cell.reused = cell.results is not None
        if cell.reused:
            lines.finish(cell)
        else:
            missing.append(cell)
            lines.begin(cell.method, "submitted")
    tasks = [(cell.method, cell.seed, settings, cell.folder.resolve()) for cell in missing]
    for number, error in attempt_all(tasks, executor, options, output) if tasks else ():
        cell = missing[number]
        cell.error = error
        cell.results = finished_results(cell.folder, cell.config)
        lines.finish(cell)


def train(
    method: str,
    seed: int,
    settings: RunSettings,
    output: Path | str | None = None,
    *,
    console: Console | None = None,
    verbose: bool = False,
    shard_backbone: bool = False,
) -> Cell:
    """One run with a live line; errors are the caller's.

    :param method: name of the method.
    :param seed: the run's seed.
    :param settings: everything else.
    :param output: the run folder; by default one below `runs/train`, named after the run.
    :param console: where the live line goes; by default to standard error.
    :param verbose: Avalanche's `InteractiveLogger` in place of the live line.
    :param shard_backbone: see :func:`~treelora_avalanche.runs.run`.
    """
    check_models([method], settings)
    config = resolve_config(method, seed, settings)
    folder = Path(output) if output is not None else Path("runs/train") / run_name(config)
    cell = Cell(method, seed, config, folder, finished_results(folder, config))
    cell.reused = cell.results is not None
    lines = MethodLines(
        [method], 1, console or Console(stderr=True), live=not verbose, measure=_measure(settings)
    )
    with lines.live:
        if cell.results is None:
            lines.begin(method, "preparing data and backbone")
            cell.results = run(
                method,
                seed,
                settings,
                folder,
                progress=lambda now: lines.step(method, now),
                note=lambda text: lines.note(cell, text),
                verbose=verbose,
                shard_backbone=shard_backbone,
            )
        lines.finish(cell)
    return cell


__all__ = ["compare", "train"]
