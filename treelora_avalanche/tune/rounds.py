"""Trials of several methods in rounds: in each round, one trial of every method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from treelora_avalanche.compare import Cell, compare
from treelora_avalanche.registry import RunSettings, check_models
from treelora_avalanche.registry.settings import TUNE_TASKS
from treelora_avalanche.runs import Ingredients, prepare
from treelora_avalanche.tune.search import MethodSearch, Trial, open_storage


@dataclass(frozen=True)
class Tuned:
    """Trials of one method.

    >>> tuned = tune(["EWCLoRA"], RunSettings(tune_tasks=3), "runs/tune")[0]
    >>> tuned.best.options
    {'lr': 0.000346, 'ewc_lambda': 5210.0}

    :param method: name of the method.
    :param trials: the trials; none if the method has nothing to choose. The first one has the
        defaults.
    :param space: the options to choose, by range.
    :param error: why a run failed, if the trials are incomplete.
    """

    method: str
    trials: list[Trial]
    space: dict[str, tuple[float, float]]
    error: str | None = None

    @property
    def best(self) -> Trial | None:
        """The trial with the highest score, the earliest of several."""
        return max(self.trials, key=lambda trial: trial.score, default=None)

    @property
    def at_ends(self) -> list[str]:
        """Options whose best value is an end of its range: a better one may lie beyond."""
        options = self.best.options if self.best is not None else {}
        return [name for name, value in options.items() if value in self.space[name]]


def tune(
    methods: Sequence[str],
    settings: RunSettings,
    output: Path | str,
    *,
    trials: int = 10,
    seeds: Sequence[int] = (0,),
    console: Console | None = None,
    executor: str | None = None,
    executor_options: Mapping[str, Any] | None = None,
) -> list[Tuned]:
    """Chooses the learning rate of each method, then its strength, on the first tasks of a stream.

    A trial trains on the first ``settings.tune_tasks`` tasks and is scored by the average accuracy
    (of texts, Op) over them after the last, on held-out training samples; the test stream is never
    read. A run that diverges scores 0. Finished trials in the folder are kept, and count. Example::

        tuned = tune(["TreeLoRA", "SeqLoRA"], RunSettings(tune_tasks=3), "runs/tune", trials=10)
        {t.method: t.best.options for t in tuned}

    :param methods: names of the methods.
    :param settings: the settings of all methods; by default with three tasks.
    :param output: folder of the journal of trials, and of the run folders, in ``trials``.
    :param trials: number of trials of each method.
    :param seeds: seeds of each trial; its score is their mean.
    :param console: console of the progress lines; by default standard error.
    :param executor: runs the trials of a round in parallel, see
        :func:`~treelora_avalanche.compare.compare`; by default they run sequentially.
    :param executor_options: options of the executor.
    :return: the trials of each method.
    :raises ValueError: before any training, if optuna is missing, a name is unknown, or the
        settings do not fit.
    """
    if trials < 1:
        raise ValueError(f"`--trials` should be at least 1, but is {trials}.")
    methods, seeds = list(dict.fromkeys(methods)), list(dict.fromkeys(seeds))
    output, console = Path(output), console or Console(stderr=True)
    if settings.tune_tasks is None:
        settings = settings.with_changes(tune_tasks=TUNE_TASKS)
    settings = _of_first_tasks(settings)
    check_models(methods, settings)
    storage = open_storage(output / "trials.journal")
    searches = {
        method: MethodSearch(method, settings, seeds, trials, storage) for method in methods
    }
    errors: dict[str, str] = {}
    prepared = _LastPrepared()
    while True:
        asked = {
            method: options
            for method, search in searches.items()
            if method not in errors and (options := search.ask()) is not None
        }
        if not asked:
            break
        for method, options in asked.items():
            number = len(searches[method].trials) + 1
            shown = ", ".join(f"{name} {value:g}" for name, value in options.items())
            console.print(f"{method}, trial {number} of {trials}: {shown}", highlight=False)
        cells = compare(
            list(asked),
            seeds,
            _with_options(settings, asked),
            output / "trials",
            console=console,
            executor=executor,
            executor_options=executor_options,
            prepared=prepared,
        )
        for method, options in asked.items():
            own = [cell for cell in cells if cell.method == method]
            failed = [cell for cell in own if cell.results is None and not cell.diverged]
            if failed:
                errors[method] = f"seed {failed[0].seed}: {str(failed[0].error).rstrip('.')}."
            else:
                searches[method].tell(_trial(options, own))
    return [
        Tuned(name, search.trials, search.space, errors.get(name))
        for name, search in searches.items()
    ]


def _of_first_tasks(settings: RunSettings) -> RunSettings:
    """Returns settings in which a list of epochs per task is as long as the first tasks."""
    if isinstance(settings.epochs_per_task, list):
        return settings.with_changes(
            epochs_per_task=settings.epochs_per_task[: settings.tune_tasks]
        )
    return settings


def _with_options(settings: RunSettings, asked: Mapping[str, Mapping[str, float]]) -> RunSettings:
    """Returns settings with options of single methods, added to those given."""
    given = settings.method_options or {}
    added = {method: {**given.get(method, {}), **asked[method]} for method in asked}
    return settings.with_changes(method_options={**given, **added})


def _trial(options: dict[str, float], cells: Sequence[Cell]) -> Trial:
    """Returns the finished trial of cells that differ in their seeds."""
    scores, seconds = [], []
    for cell in cells:
        if cell.results is None:
            scores.append(0.0)
            continue
        scores.append(next(iter(cell.results["metrics"].values()))["overall_performance"])
        timings = cell.results["timings"]
        seconds.append(timings["train_seconds"] + timings["eval_seconds"])
    known = len(seconds) == len(cells)
    return Trial(options, statistics.fmean(scores), sum(seconds) if known else None)


class _LastPrepared:
    """Stream and backbone of the last seed: trials differ in the options of methods alone."""

    def __init__(self) -> None:
        self.last: Ingredients | None = None

    def __call__(
        self, seed: int, settings: RunSettings, methods: Sequence[str] = ()
    ) -> Ingredients:
        if self.last is None or self.last.seed != seed:
            self.last = None  # only one is in memory
            self.last = prepare(seed, settings, methods)
        return self.last


__all__ = ["Tuned", "tune"]
