"""Trains methods × seeds on the same streams and backbones.

Each cell (method, seed) has a run folder named after its configuration. Finished cells are not run
again, an interrupted cell is resumed, and a failing cell does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from treelora_avalanche.choices import EXECUTORS
from treelora_avalanche.compare.cells import Cell, MethodLines
from treelora_avalanche.compare.executors import attempt, attempt_all, settings_of_jobs
from treelora_avalanche.registry import METHODS, RegistrationError, RunSettings, check_models
from treelora_avalanche.reports.table import labels
from treelora_avalanche.runs import (
    Ingredients,
    changed_inputs,
    check_arguments,
    fingerprints,
    finished_results,
    prepare,
    read_results,
    resolve_config,
    run,
    run_name,
)

Prepare = Callable[[int, RunSettings, Sequence[str]], Ingredients]
"""Signature of :func:`~treelora_avalanche.runs.prepare`."""


def compare(
    methods: Sequence[str],
    seeds: Sequence[int],
    settings: RunSettings | Sequence[RunSettings],
    output: Path | str,
    *,
    console: Console | None = None,
    executor: str | None = None,
    executor_options: Mapping[str, Any] | None = None,
    force: bool = False,
    prepared: Prepare | None = None,
) -> list[Cell]:
    """Runs every method with every seed, except for finished runs.

    >>> cells = compare(["TreeLoRA", "SeqLoRA"], [0, 1, 2], RunSettings(epochs=2), "runs/compare")

    :param methods: names of the methods, in the order of the table.
    :param seeds: the seeds; under one seed, all methods have the same stream and backbone.
    :param settings: the settings of all methods; several, which differ in options of methods alone,
        make a row for each that is different for the method, see
        :func:`~treelora_avalanche.compare.grid.expand_options`.
    :param output: folder of the run folders.
    :param console: console of the progress lines; by default standard error.
    :param executor: runs cells in parallel: ``"processes"`` or ``"slurm"``, see
        :func:`~treelora_avalanche.compare.executors.attempt_all`; by default they run sequentially.
    :param executor_options: options of the executor.
    :param force: whether to run finished cells again.
    :param prepared: returns the stream and the backbone of a seed, for comparisons that share them;
        by default :func:`~treelora_avalanche.runs.prepare`. Executors build their own.
    :return: one cell per method and seed, failed ones included.
    :raises ValueError: before any training, if a name is unknown, the data cannot be used, or the
        settings do not fit a method.
    """
    methods, seeds = list(dict.fromkeys(methods)), list(dict.fromkeys(seeds))
    if not methods or not seeds:
        raise ValueError(
            "`--methods` and `--seeds` should have at least 1 value each, but are "
            f"{methods} and {seeds}. Name a method and a seed."
        )
    broken = _broken(methods)
    usable = [method for method in methods if method not in broken]
    points = [settings] if isinstance(settings, RunSettings) else list(settings)
    check_models(usable, points[0])
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(
            f"`--output` should be a folder, but {output} is a file. Choose another path."
        )
    options = executor_options or {}
    if executor is not None:
        points = [settings_of_jobs(point, executor, options) for point in points]
    elif options:
        raise ValueError(
            "`--executor_options` should come with `--executor`, but no executor is given. Pass "
            f"`--executor` {' or '.join(EXECUTORS)}."
        )

    cells = _cells(usable, seeds, points, output, elsewhere=executor == "slurm")
    console = console or Console(stderr=True)
    failed = _failed_cells(broken, seeds, output, console)
    if not usable:
        return failed
    rows = list(dict.fromkeys(cell.row for cell, _ in cells))
    lines = MethodLines(rows, len(seeds), console, measure=_measure(points[0]))
    found = [cell for cell, _ in cells]
    with lines.live:
        known = _reuse(found, lines, force=force)
        if executor is not None:
            _run_elsewhere(cells, executor, options, output, lines)
        else:
            _run_here(cells, seeds, lines, known, prepared or prepare)
    return found + failed


def _cells(
    methods: Sequence[str],
    seeds: Sequence[int],
    points: Sequence[RunSettings],
    output: Path,
    *,
    elsewhere: bool,
) -> list[tuple[Cell, RunSettings]]:
    """Returns the cells with their settings; settings that a method does not read make none."""
    cells: dict[Path, tuple[Cell, RunSettings]] = {}
    for method in methods:
        for settings in points:
            for seed in seeds:
                config = resolve_config(method, seed, settings, elsewhere=elsewhere)
                folder = output / run_name(config)
                cells.setdefault(folder, (Cell(method, seed, config, folder), settings))
    found = list(cells.values())
    if len(points) > 1:
        names = labels([{"method": cell.method, "config": cell.config} for cell, _ in found])
        for (cell, _), name in zip(found, names, strict=True):
            cell.row = name
    return found


def _failed_cells(
    broken: Mapping[str, str], seeds: Sequence[int], output: Path, console: Console
) -> list[Cell]:
    """Prints why methods cannot be loaded, and returns their cells."""
    for reason in broken.values():
        console.print(f"failed  {escape(reason)}", soft_wrap=True, highlight=False)
    return [
        Cell(method, seed, {}, output, error=reason)
        for method, reason in broken.items()
        for seed in seeds
    ]


def _run_here(
    cells: Sequence[tuple[Cell, RunSettings]],
    seeds: Sequence[int],
    lines: MethodLines,
    known: dict[Path, str],
    prepared: Prepare,
) -> None:
    """Runs cells seed by seed, so that only one stream and backbone is in memory."""
    unchecked = {cell.row: (cell.method, own) for cell, own in cells if not cell.reused}
    for seed in seeds:
        ingredients: Ingredients | None = None
        for cell, settings in (pair for pair in cells if pair[0].seed == seed):
            if not cell.reused:
                if ingredients is None:
                    lines.begin(cell.row, "preparing data and backbone")
                    same = [method for method, own in unchecked.values() if own is settings]
                    ingredients = replace(prepared(seed, settings, same), known=known)
                    for method, own in unchecked.values():
                        if own is not settings:
                            check_arguments([method], own, ingredients)
                    unchecked = {}
                lines.begin(cell.row, "starting")
                _run_cell(cell, settings, ingredients, lines)
            lines.finish(cell)


def _broken(methods: Sequence[str]) -> dict[str, str]:
    """Returns the methods of other packages that cannot be loaded, with the reasons."""
    reasons = {}
    for method in methods:
        try:
            METHODS[method]
        except RegistrationError as error:
            reasons[method] = str(error)
    return reasons


def _measure(settings: RunSettings) -> str:
    """Returns the short name of the score that runs are ranked by."""
    return "Op" if settings.on_language else "acc"


def _reuse(cells: Sequence[Cell], lines: MethodLines, *, force: bool) -> dict[Path, str]:
    """Takes the results of finished cells, unless their inputs have changed.

    :return: the fingerprints of the files that the cells share, as far as computed.
    """
    known: dict[Path, str] = {}
    for cell in cells:
        finished = finished_results(cell.folder, cell.config)
        if finished is None:
            continue
        changed = changed_inputs(finished, fingerprints(cell.config, known))
        if not changed and not force:
            cell.results, cell.reused = finished, True
            continue
        reason = f"{' and '.join(changed)} changed since" if changed else "`--force`"
        lines.note(cell, f"runs again ({reason}); the earlier run is kept in {cell.folder}.old*")
    return known


def _run_cell(
    cell: Cell, settings: RunSettings, ingredients: Ingredients, lines: MethodLines
) -> None:
    cell.error = attempt(
        cell.method,
        cell.seed,
        settings,
        cell.folder,
        ingredients=ingredients,
        progress=lambda now: lines.step(cell.row, now),
        note=lambda text: lines.note(cell, text),
    )
    cell.results = finished_results(cell.folder, cell.config)


def _run_elsewhere(
    cells: Sequence[tuple[Cell, RunSettings]],
    executor: str,
    options: Mapping[str, Any],
    output: Path,
    lines: MethodLines,
) -> None:
    missing = []
    for cell, settings in cells:
        if cell.reused:
            lines.finish(cell)
        else:
            missing.append((cell, settings))
            lines.begin(cell.row, "submitted")
    tasks = [(cell.method, cell.seed, own, cell.folder.resolve()) for cell, own in missing]
    for number, error in attempt_all(tasks, executor, options, output) if tasks else ():
        cell, _ = missing[number]
        cell.error = error
        cell.results = finished_results(cell.folder, cell.config)
        lines.finish(cell)


def earlier_results(output: Path, cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], int]:
    """Returns the results of earlier comparisons in a folder, on the stream of the cells.

    :param output: the folder.
    :param cells: cells of the present comparison, whose results are left out.
    :return: the results, and the number of those on other streams.
    """
    present = {cell.folder.resolve() for cell in cells}
    streams = [_stream_of(cell.results) for cell in cells if cell.results is not None]
    found, n_others = [], 0
    for file in sorted(output.glob("*/results.json")):
        if file.parent.resolve() in present or ".old" in file.parent.suffix:
            continue
        results = read_results(file)
        if results is None or not streams:
            continue
        if _stream_of(results) == streams[0]:
            found.append(results)
        else:
            n_others += 1
    return found, n_others


def _stream_of(results: dict[str, Any]) -> tuple[Any, ...]:
    stream = results["stream"]
    names = stream.get("task_names") or stream["class_names"]
    config = results["config"]
    return config["scenario"], config.get("tune_tasks"), len(stream["trained"]), names


def train(
    method: str,
    seed: int,
    settings: RunSettings,
    output: Path | str | None = None,
    *,
    console: Console | None = None,
    verbose: bool = False,
    shard_backbone: bool = False,
    force: bool = False,
) -> Cell:
    """Makes one run with a progress line; its errors are raised.

    >>> train("TreeLoRA", 0, RunSettings(epochs=2)).folder

    :param method: name of the method.
    :param seed: the run's seed.
    :param settings: the settings.
    :param output: the run folder; by default a new one in ``runs/train``, named after the run.
    :param console: console of the progress line; by default standard error.
    :param verbose: whether to show Avalanche's ``InteractiveLogger`` instead of the progress line.
    :param shard_backbone: see :func:`~treelora_avalanche.runs.run`.
    :param force: whether to run again if it is finished.
    """
    check_models([method], settings)
    config = resolve_config(method, seed, settings)
    folder = Path(output) if output is not None else Path("runs/train") / run_name(config)
    cell = Cell(method, seed, config, folder)
    lines = MethodLines(
        [method], 1, console or Console(stderr=True), live=not verbose, measure=_measure(settings)
    )
    with lines.live:
        known = _reuse([cell], lines, force=force)
        if cell.results is None:
            lines.begin(method, "preparing data and backbone")
            cell.results = run(
                method,
                seed,
                settings,
                folder,
                known=known,
                progress=lambda now: lines.step(method, now),
                note=lambda text: lines.note(cell, text),
                verbose=verbose,
                shard_backbone=shard_backbone,
            )
        lines.finish(cell)
    return cell


__all__ = ["compare", "earlier_results", "train"]
