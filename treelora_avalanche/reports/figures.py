"""Figures of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from treelora_avalanche.reports.style import COLOURS, LINES, MARKERS, new_figure, plain
from treelora_avalanche.reports.table import is_language, label
from treelora_avalanche.reports.tree_growth import tree_growth

KINDS = {
    "class_incremental": "among all classes",
    "within_task": "among the task's own",
    "generated": "generated text",
}
COLUMNS = 5
""" Accuracy matrices side by side. """


def _kinds(results: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds of accuracy matrices that there are; the first is what methods are ranked by."""
    return [kind for kind in KINDS if kind in results[0]["accuracy_matrix"]]


def _measure(results: Sequence[dict[str, Any]]) -> str:
    """What a matrix holds, in a word."""
    return "score" if is_language(results) else "accuracy"


def _by_method(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    methods: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        methods.setdefault(label(result), []).append(result)
    return methods


def _matrices(results: Sequence[dict[str, Any]], kind: str) -> np.ndarray:
    """Accuracy in percent, NaN where unknown. # (n_seeds, n_tasks, n_tasks)"""
    stacked = [result["accuracy_matrix"][kind] for result in results]
    return 100 * np.array(stacked, dtype=float)


def _style(k: int) -> dict[str, Any]:
    """Colour, marker and line of the k-th method: as many as two times seven can be told apart."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "marker": MARKERS[k % len(MARKERS)],
        "linestyle": LINES[k // len(COLOURS) % len(LINES)],
    }


def _final_accuracy(results: Sequence[dict[str, Any]]) -> np.ndarray:
    """In percent. # (n_seeds,)"""
    kind = _kinds(results)[0]
    return 100 * np.array([r["metrics"][kind]["overall_performance"] for r in results])


def accuracy_matrices(results: Sequence[dict[str, Any]]) -> Figure:
    """Heat maps of the accuracy on each task after each task, mean over seeds.

    One column per method; of streams of classes the upper row is class-incremental, the lower one
    within the task. More than five methods continue in further rows. Grey: not evaluated.

    :param results: contents of `results.json` files.
    """
    methods = _by_method(results)
    n_tasks = len(results[0]["stream"]["trained"])
    side = max(2.2, 0.36 * n_tasks)
    columns = min(COLUMNS, len(methods))
    blocks = -(-len(methods) // columns)
    kinds = _kinds(results)
    figure = new_figure(side * columns + 1.5, (len(kinds) * side + 0.4) * blocks + 0.6)
    grid = figure.subplots(len(kinds) * blocks, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    every = max(1, n_tasks // 10)
    for k, (method, own) in enumerate(methods.items()):
        for row, kind in enumerate(kinds):
            axes = grid[len(kinds) * (k // columns) + row, k % columns]
            axes.set_axis_on()
            stacked = _matrices(own, kind)
            matrix = stacked.mean(axis=0)  # the same cells are unknown for all seeds
            axes.set_facecolor("0.93")
            image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=100)
            for j, i in np.argwhere(~np.isnan(matrix)) if n_tasks <= 12 else ():
                axes.text(
                    i,
                    j,
                    f"{matrix[j, i]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if matrix[j, i] > 60 else "white",
                )
            axes.set_xticks(range(0, n_tasks, every), range(1, n_tasks + 1, every), fontsize=7)
            axes.set_yticks(range(0, n_tasks, every), range(1, n_tasks + 1, every), fontsize=7)
            if row == 0:
                axes.set_title(method, fontsize=11)
            if k % columns == 0:
                axes.set_ylabel(KINDS[kind], fontsize=9)
    figure.supxlabel(f"{_measure(results)} on task", fontsize=10)
    figure.supylabel("after training on task", fontsize=10)
    label = f"{_measure(results)}, %"
    figure.colorbar(image, ax=list(grid.flat), label=label, fraction=0.04, aspect=30)
    return figure


def accuracy_over_tasks(results: Sequence[dict[str, Any]]) -> Figure:
    """Mean accuracy over the tasks seen (Op_n) after each task, one line per method.

    A method that learns all tasks at once has no line but a level, at the right end.

    :param results: contents of `results.json` files.
    """
    n_tasks = len(results[0]["stream"]["trained"])
    figure = new_figure(8.0, 4.2)
    axes = figure.subplots()
    tasks = np.arange(1, n_tasks + 1)
    lines = {}
    for k, (method, own) in enumerate(_by_method(results).items()):
        matrices = _matrices(own, _kinds(results)[0])
        seen = np.array([[m[n - 1, :n].mean() for n in tasks] for m in matrices])
        mean = seen.mean(axis=0)
        style = _style(k)
        name = f"{method}  {mean[-1]:.1f}"
        if n_tasks > 1 and np.isnan(mean[0]):
            handle = axes.axhline(mean[-1], color=style["color"], linestyle=(0, (1, 1)), lw=1.5)
        else:
            (handle,) = axes.plot(tasks, mean, markersize=5, lw=1.5, **style)
        lines[name] = (mean[-1], handle)
        if len(own) > 1 and not np.isnan(mean[0]):
            spread = seen.std(axis=0, ddof=1)
            axes.fill_between(
                tasks, mean - spread, mean + spread, color=style["color"], alpha=0.12, lw=0
            )
    axes.set_xticks(tasks[:: max(1, n_tasks // 10)])
    _accuracy_axis(axes)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel(f"mean {_measure(results)} on tasks seen, %")
    # In the order of the lines' right ends.
    ranked = sorted(lines.items(), key=lambda item: -item[1][0])
    figure.legend(
        [handle for _, (_, handle) in ranked],
        [name for name, _ in ranked],
        title="after the last task, %",
        title_fontsize=8,
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    plain(axes)
    return figure


def _accuracy_axis(axes: Axes) -> None:
    """From 0 where something is near it; else the lower part is left out, where nothing is."""
    low, high = axes.get_ylim()
    axes.set_ylim(0 if low < 0.4 * high else low, min(high, 101))


def _epochs_in_words(epochs: int | list[int]) -> str:
    """Per task, or of all tasks together where they differ."""
    if isinstance(epochs, list) and len(set(epochs)) > 1:
        return f"{sum(epochs)} epochs in all"
    each = epochs[0] if isinstance(epochs, list) else epochs
    return f"{each} epoch{'s' if each > 1 else ''}"


def speed_against_accuracy(results: Sequence[dict[str, Any]]) -> Figure:
    """Final accuracy against training speed, one point per method; bars: deviation over seeds.

    :param results: contents of `results.json` files.
    """
    figure = new_figure(8.0, 4.2)
    axes = figure.subplots()
    speeds: list[float] = []
    handles = []
    for k, (method, own) in enumerate(_by_method(results).items()):
        style = _style(k)
        speed = np.array([r["timings"]["samples_per_second"] for r in own])
        accuracy = _final_accuracy(own)
        many = len(own) > 1
        epochs = _epochs_in_words(own[0]["epochs"])
        points = axes.errorbar(
            speed.mean(),
            accuracy.mean(),
            xerr=speed.std(ddof=1) if many else None,
            yerr=accuracy.std(ddof=1) if many else None,
            color=style["color"],
            marker=style["marker"],
            # Hollow where the colours begin again.
            markerfacecolor=style["color"] if k < len(COLOURS) else "white",
            linestyle="none",
            markersize=7,
            capsize=3,
            elinewidth=1,
        )
        points[0].set_label(f"{method} ({epochs})")
        handles.append(points[0])
        speeds += [*speed]
    if max(speeds) > 3 * min(speeds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    _accuracy_axis(axes)
    axes.set_xlabel("training speed, samples of the stream per second")
    axes.set_ylabel(f"mean {_measure(results)} after the last task, %")
    # Without the error bars, which hide the markers at this size.
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    plain(axes)
    return figure


FIGURES: dict[str, Callable[[Sequence[dict[str, Any]]], Figure | None]] = {
    "accuracy_matrices.png": accuracy_matrices,
    "accuracy_over_tasks.png": accuracy_over_tasks,
    "speed_against_accuracy.png": speed_against_accuracy,
    "tree.png": tree_growth,
}


def write_figures(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw all figures that the results have the data for.

    :param results: contents of `results.json` files, of one stream.
    :param folder: created if it is not there.
    :return: the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        figure = draw(results)
        if figure is None:  # a figure of an earlier comparison would be of other methods
            (folder / name).unlink(missing_ok=True)
            continue
        figure.savefig(folder / name)
        paths.append(folder / name)
    return paths


__all__ = [
    "FIGURES",
    "accuracy_matrices",
    "accuracy_over_tasks",
    "speed_against_accuracy",
    "tree_growth",
    "write_figures",
]
