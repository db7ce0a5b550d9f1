"""Choice of hyper-parameters: a table, a file of trials, and YAML for ``treelora compare``."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table

from treelora_avalanche.registry import RunSettings
from treelora_avalanche.reports.table import short_seconds
from treelora_avalanche.runs import write_text
from treelora_avalanche.tune.rounds import Tuned

HEADERS = ("Method", "Chosen", "Trials", "Default", "Best", "Time")


def _rows(tuned: Sequence[Tuned]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for of_method in tuned:
        trials, best = of_method.trials, of_method.best
        chosen = _shown(best.options) if best else "no options to choose"
        if of_method.error is not None:
            chosen = "failed"
        known = [trial.seconds for trial in trials if trial.seconds is not None]
        rows.append(
            (
                of_method.method,
                chosen,
                str(len(trials)),
                f"{100 * trials[0].score:.1f}" if trials else "–",
                f"{100 * best.score:.1f}" if best else "–",
                short_seconds(sum(known)) if known else "–",
            )
        )
    return rows


def _shown(options: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def caption(tuned: Sequence[Tuned], settings: RunSettings, seeds: Sequence[int]) -> str:
    """Returns the definitions of the columns, and the cost of the trials.

    :param tuned: from :func:`~treelora_avalanche.tune.tune`.
    :param settings: the settings of the trials.
    :param seeds: the seeds of each trial.
    """
    trials = [trial for of_method in tuned for trial in of_method.trials]
    n_diverged = sum(trial.seconds is None for trial in trials)
    at_ends = [f"{t.method} {name}" for t in tuned for name in t.at_ends]
    return (
        f"{settings.scenario}: first {settings.tune_tasks} tasks; Default, Best: score in % over "
        "them after the last, on held-out training samples, "
        f"{'seed' if len(seeds) == 1 else 'mean over seeds'} {', '.join(map(str, seeds))}. "
        f"{len(trials)} trials, "
        f"{short_seconds(sum(trial.seconds or 0.0 for trial in trials))} of training and evaluation"
        + (f"; {n_diverged} diverged (score 0)." if n_diverged else ".")
        + (f" At an end of their range: {', '.join(at_ends)}." if at_ends else "")
    )


def table(tuned: Sequence[Tuned]) -> Table:
    """Returns the table of choices for a terminal.

    :param tuned: from :func:`~treelora_avalanche.tune.tune`.
    """
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for number, header in enumerate(HEADERS):
        shown.add_column(header, justify="left" if number < 2 else "right")
    for row in _rows(tuned):
        shown.add_row(*row)
    return shown


def _markdown(tuned: Sequence[Tuned], below: str) -> str:
    lines = [HEADERS, tuple("---" if n < 2 else "---:" for n in range(len(HEADERS))), *_rows(tuned)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{below}\n"


def _trials(tuned: Sequence[Tuned]) -> str:
    """Returns the trials as CSV, one column per option."""
    options = dict.fromkeys(name for t in tuned for trial in t.trials for name in trial.options)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["method", "trial", *options, "score", "seconds"], lineterminator="\n"
    )
    writer.writeheader()
    for of_method in tuned:
        for number, trial in enumerate(of_method.trials, start=1):
            row = {"method": of_method.method, "trial": number, **trial.options}
            writer.writerow({**row, "score": trial.score, "seconds": trial.seconds})
    return text.getvalue()


def tuned_config(tuned: Sequence[Tuned], settings: RunSettings) -> dict[str, Any]:
    """Returns a configuration of ``treelora compare`` with the chosen options.

    Methods whose trials are incomplete are left out.

    :param tuned: from :func:`~treelora_avalanche.tune.tune`.
    :param settings: the settings of the trials; the comparison is on the whole stream.
    """
    given = settings.method_options or {}
    options = {
        t.method: {**given.get(t.method, {}), **(t.best.options if t.best else {})}
        for t in tuned
        if t.error is None
    }
    config = {
        field.name: getattr(settings, field.name)
        for field in fields(RunSettings)
        if field.name not in ("tune_tasks", "method_options")
        and getattr(settings, field.name) != field.default
    }
    chosen = {method: own for method, own in options.items() if own}
    return {**config, "methods": list(options), **({"method_options": chosen} if chosen else {})}


def write_tuned(
    tuned: Sequence[Tuned], settings: RunSettings, output: Path | str, seeds: Sequence[int] = (0,)
) -> None:
    """Writes ``tuned.yaml``, ``trials.csv`` and ``tuned.md``.

    :param tuned: from :func:`~treelora_avalanche.tune.tune`.
    :param settings: the settings of the trials.
    :param output: an existing folder.
    :param seeds: the seeds of each trial.
    """
    output, below = Path(output), caption(tuned, settings, seeds)
    config = yaml.safe_dump(tuned_config(tuned, settings), sort_keys=False)
    comment = textwrap.wrap(f"Chosen by treelora tune. {below}", 98)
    head = "\n".join(f"# {line}" for line in comment)
    write_text(output / "tuned.yaml", f"{head}\n\n{config}")
    write_text(output / "trials.csv", _trials(tuned))
    write_text(output / "tuned.md", _markdown(tuned, below))


__all__ = ["caption", "table", "tuned_config", "write_tuned"]
