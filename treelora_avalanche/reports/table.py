"""Table of a comparison, for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from treelora_avalanche.reports.grids import grid_width, markdown_grid, rich_grid, split_grid
from treelora_avalanche.reports.task_scores import task_cells, task_rows
from treelora_avalanche.runs import to_json, write_text


@dataclass(frozen=True)
class Column:
    """One column of the table.

    >>> Column("steps", ("Steps", ""), lambda result: result["timings"]["steps"], str)

    :param key: name in ``comparison.json``.
    :param header: two lines; an arrow points to the better values.
    :param read: reads the number from the content of a ``results.json``; None where undefined.
    :param show: formats the number.
    :param spread: whether to show the deviation over seeds.
    """

    key: str
    header: tuple[str, str]
    read: Callable[[dict[str, Any]], float | None]
    show: Callable[[float], str]
    spread: bool = False


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def short_bytes(value: float) -> str:
    """Returns bytes as a short text, in powers of ten.

    >>> short_bytes(1_234_567)
    '1.2 MB'

    :param value: number of bytes.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def short_count(value: float) -> str:
    """Returns a count as a short text.

    >>> short_count(85_800_000)
    '85.8 M'

    :param value: the count.
    """
    return short_bytes(value).replace("kB", "k").replace("MB", "M").replace("GB", "G").rstrip(" B")


def short_seconds(value: float) -> str:
    """Returns a duration as a short text: 12.3 s, 4 min 05, 2 h 10.

    :param value: number of seconds.
    """
    if value < 100:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 100:
        return f"{minutes} min {seconds:02}"
    return f"{minutes // 60} h {minutes % 60:02}"


def _score(key: str, header: str, kind: str, name: str) -> Column:
    """Returns a column of a score.

    :param key: key of the column.
    :param header: first line of the header.
    :param kind: kind of the accuracy matrix.
    :param name: name of the score.
    """

    def read(result: dict[str, Any]) -> float | None:
        value: float | None = result["metrics"][kind][name]
        return value

    return Column(key, (header, "%"), read, _percent, spread=True)


def _signed_percent(value: float) -> str:
    return f"{100 * value:+.1f}" if abs(value) < 10 else f"{100 * value:+.0f}"


def plain_text_change(result: dict[str, Any]) -> float | None:
    """Returns the relative change of the perplexity on plain text, after / before - 1.

    :param result: content of a ``results.json``.
    :return: None if it was not measured.
    """
    measured = result.get("plain_text")
    return measured["change"] if measured else None


def _integer(value: float) -> str:
    return f"{value:.0f}"


def router_accuracy(result: dict[str, Any]) -> float | None:
    """Returns the mean over tasks of the share of prompts that got their own task's adapter.

    :param result: content of a ``results.json``.
    :return: None for a method that routes no prompts.
    """
    routes = result.get("routes")
    if not routes:
        return None
    return statistics.fmean(of.get(task, 0) / sum(of.values()) for task, of in routes.items())


_VISION = (
    _score("accuracy", "Acc ↑", "class_incremental", "overall_performance"),
    _score("within_task_accuracy", "in task ↑", "within_task", "overall_performance"),
    _score("backward_transfer", "Bwt ↓", "class_incremental", "backward_transfer"),
    _score("forgetting", "Forget ↓", "class_incremental", "forgetting"),
    Column("epochs", ("Ep.", "/task"), lambda r: r["epochs"], _integer),
)
_LANGUAGE = (
    _score("score", "Op ↑", "generated", "overall_performance"),
    _score("backward_transfer", "Bwt ↓", "generated", "backward_transfer"),
    Column("general_change", ("general Δ ↓", "ppl %"), plain_text_change, _signed_percent, True),
    _score("forgetting", "Forget ↓", "generated", "forgetting"),
    # The sum over tasks, which may differ in their epochs.
    Column("epochs", ("Epochs", "in all"), lambda r: sum(r["epochs"]), _integer),
    Column(
        "tokens_per_second",
        ("tokens", "/s"),
        lambda r: r["timings"]["tokens_per_second"],
        _integer,
    ),
)
_ROUTER = Column("router_accuracy", ("Router ↑", "%"), router_accuracy, _percent, spread=True)
_COST = (
    Column("train_seconds", ("Time", ""), lambda r: r["timings"]["train_seconds"], short_seconds),
    Column("ms_per_step", ("ms", "/step"), lambda r: r["timings"]["ms_per_step"], _three_digits),
    Column(
        "samples_per_second",
        ("samples", "/s"),
        lambda r: r["timings"]["samples_per_second"],
        _integer,
    ),
    Column("peak_bytes", ("Peak", "memory"), lambda r: r["memory"]["peak_bytes"], short_bytes),
    Column(
        "trainable_parameters",
        ("Train", "params"),
        lambda r: r["parameters"]["trainable"],
        short_count,
    ),
    Column("stored_bytes", ("Stored", ""), lambda r: r["memory"]["stored_bytes"], short_bytes),
)


def columns_of(results: Sequence[dict[str, Any]]) -> tuple[Column, ...]:
    """Returns the columns for the kind of stream, images or texts.

    :param results: contents of ``results.json`` files, of one stream.
    """
    routed = (_ROUTER,) if any(router_accuracy(result) is not None for result in results) else ()
    return (_LANGUAGE if is_language(results) else _VISION) + routed + _COST


def is_language(results: Sequence[dict[str, Any]]) -> bool:
    """Returns whether the results are of language models, with scores of generated texts.

    :param results: contents of ``results.json`` files, of one stream.
    """
    return "generated" in results[0]["metrics"]


@dataclass(frozen=True)
class Row:
    """One row of the table: a method, over its seeds.

    >>> [row.mean["accuracy"] for row in summarise(results)]

    :param method: the method, with its options.
    :param seeds: the seeds.
    :param mean: mean over seeds, by the key of the column.
    :param std: sample standard deviation over seeds, by key; NaN with fewer than two.
    """

    method: str
    seeds: list[int]
    mean: dict[str, float]
    std: dict[str, float]


_UNNAMED = frozenset({"method", "seed", "device"})
"""Keys of a configuration that never tell rows apart."""


def _settings_of(result: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run, with its method's options among the settings."""
    config = dict(result["config"])
    options = config.pop("method_options", {}).get(result["method"], {})
    return {k: v for k, v in {**config, **options}.items() if k not in _UNNAMED}


def labels(results: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the name of each run's row: its method and options.

    Where runs of one method have different settings, these are named too.

    :param results: contents of ``results.json`` files.
    """
    of_method: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        of_method.setdefault(result["method"], []).append(_settings_of(result))
    differing = {
        method: {
            name
            for name in {name for settings in all_settings for name in settings}
            if len({repr(settings.get(name)) for settings in all_settings}) > 1
        }
        for method, all_settings in of_method.items()
    }

    def label(result: dict[str, Any]) -> str:
        method: str = result["method"]
        given = result["config"].get("method_options", {}).get(method, {})
        settings = _settings_of(result)
        shown = [f"{k}={v}" for k, v in settings.items() if k in given or k in differing[method]]
        return f"{method} ({', '.join(shown)})" if shown else method

    return [label(result) for result in results]


def differing_settings(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the settings that differ between methods, each as values by method.

    :param results: contents of ``results.json`` files.
    """
    rows = dict(zip(labels(results), (result["config"] for result in results), strict=True))
    names = dict.fromkeys(name for config in rows.values() for name in config)
    values = {
        name: {row: config[name] for row, config in rows.items() if name in config}
        for name in names
        if name not in _UNNAMED | {"method_options"}
    }
    return {
        name: of_row
        for name, of_row in values.items()
        if len({repr(value) for value in of_row.values()}) > 1
    }


def summarise(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Returns one row per method, in order of first appearance.

    :param results: contents of ``results.json`` files.
    """
    rows = []
    columns = columns_of(results)
    names = labels(results)
    for method in dict.fromkeys(names):
        own = [r for r, name in zip(results, names, strict=True) if name == method]
        values = {column.key: [_number(column.read(r)) for r in own] for column in columns}
        rows.append(
            Row(
                method=method,
                seeds=[result["seed"] for result in own],
                mean={key: statistics.fmean(v) for key, v in values.items()},
                std={key: _deviation(v) for key, v in values.items()},
            )
        )
    return rows


def _deviation(values: list[float]) -> float:
    # `statistics.stdev` raises on NaN, which stands for an undefined number.
    defined = len(values) > 1 and not any(map(math.isnan, values))
    return statistics.stdev(values) if defined else math.nan


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _cell(row: Row, column: Column, plus_minus: str) -> str:
    if math.isnan(row.mean[column.key]):
        return "–"
    text = column.show(row.mean[column.key])
    if column.spread and not math.isnan(row.std[column.key]):
        text += plus_minus + column.show(row.std[column.key])
    return text


def caption(results: Sequence[dict[str, Any]]) -> str:
    """Returns the definitions of the columns, and the settings that differ between methods.

    :param results: contents of ``results.json`` files.
    """
    first = results[0]
    tuned = first["config"].get("tune_tasks") is not None
    stream, seeds = first["stream"], sorted({result["seed"] for result in results})
    if is_language(results):
        what = Path(first["config"]["model"]).name
        scores = "Op: mean over tasks, after the last one, of each task's own score of greedily "
        scores += "generated texts. tokens: of the stream, without padding. "
        if task_rows(results, labels(results)):
            scores += "By task: the same, with the score of always giving the most frequent "
            scores += "training answer, and chance, 1 / number of distinct training answers. "
        if any(plain_text_change(result) is not None for result in results):
            scores += "general Δ: change of the perplexity on plain text that is none of the "
            scores += "tasks, after / before - 1. "
        if any(router_accuracy(result) is not None for result in results):
            scores += "Router: prompts that got the adapter of their own task. "
    else:
        what = f"{len(stream['class_names'])} classes"
        scores = "Acc: class-incremental accuracy, mean over tasks after the last one; in task: "
        scores += "within-task accuracy. "
    return (
        f"{first['config']['scenario']}: "
        f"{'held-out training samples of the first ' if tuned else ''}"
        f"{len(stream['trained'])} tasks, {what}, "
        f"{first['hardware']['device']}; "
        f"mean{' ± deviation' if len(seeds) > 1 else ''} over "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}.\n"
        f"{scores}Bwt = (1/n) Σ f_i(w_i) − f_i(w_n), positive is forgetting; "
        "Forget: the same over n − 1. "
        f"Peak: {first['memory']['peak_kind']}. Stored: tensors kept in addition to the model."
        f"{_differences(results)}"
    )


def _differences(results: Sequence[dict[str, Any]]) -> str:
    """Returns a line on differing settings, the most frequent value of each first; or nothing."""
    parts = []
    for name, of_method in differing_settings(results).items():
        by_value: dict[str, list[str]] = {}
        for method, value in of_method.items():
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            by_value.setdefault(shown, []).append(method)
        common, *others = sorted(by_value, key=lambda value: -len(by_value[value]))
        exceptions = ", ".join(f"{' and '.join(by_value[value])} {value}" for value in others)
        parts.append(f"{name} {common} ({exceptions})")
    return f"\nSettings that differ: {'; '.join(parts)}." if parts else ""


def rich_table(results: Sequence[dict[str, Any]], width: int = 120) -> Group:
    """Returns the table for a terminal, split where the terminal is narrow, and scores by task.

    :param results: contents of ``results.json`` files.
    :param width: width of the terminal in characters.
    """
    rows = summarise(results)

    def table(columns: Sequence[Column]) -> Table:
        cells = [[row.method, *(_cell(row, column, "±") for column in columns)] for row in rows]
        return rich_grid(["\n".join(column.header).rstrip() for column in columns], cells)

    columns = columns_of(results)
    tables = [table(columns)]
    if grid_width(tables[0]) > width:
        learned = [column for column in columns if column.spread]
        tables = [table(learned), table([column for column in columns if not column.spread])]
    tasks, scores = task_cells(results, labels(results))
    tables += split_grid([f"{name}\n%" for name in tasks], scores, width)
    return Group(*tables, Text(caption(results), style="dim"))


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """Returns the table as Markdown, scores by task, and the caption.

    :param results: contents of ``results.json`` files.
    """
    columns = columns_of(results)
    headers = [" ".join(column.header).strip() for column in columns]
    lines = [
        [row.method, *(_cell(row, column, " ± ") for column in columns)]
        for row in summarise(results)
    ]
    tables = [markdown_grid(headers, lines)]
    tasks, scores = task_cells(results, labels(results))
    if tasks:
        tables.append(markdown_grid([f"{name} %" for name in tasks], scores))
    return "\n\n".join([*tables, caption(results)]) + "\n"


def write_table(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes ``table.md`` and ``comparison.json``.

    :param results: contents of ``results.json`` files.
    :param folder: an existing folder.
    """
    write_text(folder / "table.md", markdown_table(results))
    rows = [
        {"method": row.method, "seeds": row.seeds, "mean": row.mean, "std": row.std}
        for row in summarise(results)
    ]
    write_text(folder / "comparison.json", to_json({"schema_version": 1, "rows": rows}) + "\n")


__all__ = [
    "Column",
    "Row",
    "caption",
    "columns_of",
    "differing_settings",
    "is_language",
    "labels",
    "markdown_table",
    "rich_table",
    "short_bytes",
    "short_count",
    "short_seconds",
    "summarise",
    "write_table",
]
