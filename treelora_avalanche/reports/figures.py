"""Figures of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from treelora_avalanche.reports.style import COLOURS, LINES, MARKERS, new_figure, plain
from treelora_avalanche.reports.table import is_language, labels
from treelora_avalanche.reports.tree_growth import tree_growth

KINDS = {
    "class_incremental": "class-incremental",
    "within_task": "within-task",
    "generated": "generated text",
}
COLUMNS = 5
"""Accuracy matrices per row."""


def _kinds(results: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the kinds of accuracy matrices in the results; methods are ranked by the first."""
    return [kind for kind in KINDS if kind in results[0]["accuracy_matrix"]]


def _measure(results: Sequence[dict[str, Any]]) -> str:
    """Returns the name of the numbers in an accuracy matrix."""
    return "score" if is_language(results) else "accuracy"


def _by_method(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    methods: dict[str, list[dict[str, Any]]] = {}
    for name, result in zip(labels(results), results, strict=True):
        methods.setdefault(name, []).append(result)
    return methods


def _matrices(results: Sequence[dict[str, Any]], kind: str) -> np.ndarray:
    """Returns accuracies in percent, ``(n_seeds, n_tasks, n_tasks)``; NaN where not evaluated."""
    stacked = [result["accuracy_matrix"][kind] for result in results]
    return 100 * np.array(stacked, dtype=float)


def _style(k: int) -> dict[str, Any]:
    """Returns colour, marker and line of the k-th method; distinct for 14 methods."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "marker": MARKERS[k % len(MARKERS)],
        "linestyle": LINES[k // len(COLOURS) % len(LINES)],
    }


def _final_accuracy(results: Sequence[dict[str, Any]]) -> np.ndarray:
    """Returns the final overall performance in percent, ``(n_seeds,)``."""
    kind = _kinds(results)[0]
    return 100 * np.array([r["metrics"][kind]["overall_performance"] for r in results])


def accuracy_matrices(results: Sequence[dict[str, Any]]) -> Figure:
    """Draws heat maps of the accuracy on each task after each task, mean over seeds.

    One column per method, :data:`COLUMNS` per row; for streams of classes, the class-incremental
    matrix above the within-task one. Grey: not evaluated.

    :param results: contents of ``results.json`` files.
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
    for k, (method, own) in enumerate(methods.items()):
        for row, kind in enumerate(kinds):
            axes = grid[len(kinds) * (k // columns) + row, k % columns]
            image = _draw_matrix(axes, _matrices(own, kind).mean(axis=0))
            if row == 0:
                axes.set_title(method, fontsize=11)
            if k % columns == 0:
                axes.set_ylabel(KINDS[kind], fontsize=9)
    figure.supxlabel(f"{_measure(results)} on task", fontsize=10)
    figure.supylabel("after training on task", fontsize=10)
    label = f"{_measure(results)}, %"
    figure.colorbar(image, ax=list(grid.flat), label=label, fraction=0.04, aspect=30)
    return figure


def _draw_matrix(axes: Axes, matrix: np.ndarray) -> AxesImage:
    n_tasks = len(matrix)
    axes.set_axis_on()
    axes.set_facecolor("0.93")
    image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=100)
    for j, i in np.argwhere(~np.isnan(matrix)) if n_tasks <= 12 else ():
        colour = "black" if matrix[j, i] > 60 else "white"
        text = f"{matrix[j, i]:.0f}"
        axes.text(i, j, text, ha="center", va="center", fontsize=7, color=colour)
    every = max(1, n_tasks // 10)
    labels = [str(task) for task in range(1, n_tasks + 1, every)]
    axes.set_xticks(range(0, n_tasks, every), labels, fontsize=7)
    axes.set_yticks(range(0, n_tasks, every), labels, fontsize=7)
    return image


def accuracy_over_tasks(results: Sequence[dict[str, Any]]) -> Figure:
    """Draws the mean accuracy over the tasks seen, Op_n, after each task n, one line per method.

    Joint training has a horizontal line at its final accuracy.

    :param results: contents of ``results.json`` files.
    """
    n_tasks = len(results[0]["stream"]["trained"])
    figure = new_figure(8.0, 4.2)
    axes = figure.subplots()
    tasks = np.arange(1, n_tasks + 1)
    lines = {}
    for k, (method, own) in enumerate(_by_method(results).items()):
        matrices = _matrices(own, _kinds(results)[0])
        seen = np.array([[m[n - 1, :n].mean() for n in tasks] for m in matrices])
        final = seen.mean(axis=0)[-1]
        lines[f"{method}  {final:.1f}"] = (final, _draw_line(axes, seen, _style(k)))
    axes.set_xticks(tasks[:: max(1, n_tasks // 10)])
    _accuracy_axis(axes)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel(f"mean {_measure(results)} on tasks seen, %")
    # The legend follows the order of the lines at their right ends.
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


def _draw_line(axes: Axes, seen: np.ndarray, style: dict[str, Any]) -> Line2D:
    """Draws Op_n of one method, ``(n_seeds, n_tasks)``: the mean, and the deviation as a band."""
    mean = seen.mean(axis=0)
    tasks = np.arange(1, len(mean) + 1)
    if len(mean) > 1 and np.isnan(mean[0]):
        handle = axes.axhline(mean[-1], color=style["color"], linestyle=(0, (1, 1)), lw=1.5)
    else:
        (handle,) = axes.plot(tasks, mean, markersize=5, lw=1.5, **style)
    if len(seen) > 1 and not np.isnan(mean[0]):
        spread = seen.std(axis=0, ddof=1)
        axes.fill_between(
            tasks, mean - spread, mean + spread, color=style["color"], alpha=0.12, lw=0
        )
    return handle


def _accuracy_axis(axes: Axes) -> None:
    """Starts the axis at 0 if any value is near 0; otherwise cuts off the empty lower part."""
    low, high = axes.get_ylim()
    axes.set_ylim(0 if low < 0.4 * high else low, min(high, 101))


def _epochs_in_words(epochs: int | list[int]) -> str:
    """Returns the epochs per task, or their sum if tasks differ."""
    if isinstance(epochs, list) and len(set(epochs)) > 1:
        return f"{sum(epochs)} epochs in all"
    each = epochs[0] if isinstance(epochs, list) else epochs
    return f"{each} epoch{'s' if each > 1 else ''}"


def speed_against_accuracy(results: Sequence[dict[str, Any]]) -> Figure:
    """Draws final accuracy against training speed, one point per method; bars: deviation.

    :param results: contents of ``results.json`` files.
    """
    figure = new_figure(8.0, 4.2)
    axes = figure.subplots()
    speeds: list[float] = []
    handles = []
    for k, (method, own) in enumerate(_by_method(results).items()):
        speed = np.array([r["timings"]["samples_per_second"] for r in own])
        point = _draw_point(axes, k, speed, _final_accuracy(own))
        point.set_label(f"{method} ({_epochs_in_words(own[0]['epochs'])})")
        handles.append(point)
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
    # Markers only: error bars would hide them in the legend.
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    plain(axes)
    return figure


def _draw_point(axes: Axes, k: int, speed: np.ndarray, accuracy: np.ndarray) -> Line2D:
    """Draws the mean and deviation over seeds of the k-th method; returns the marker."""
    style = _style(k)
    many = len(speed) > 1
    points = axes.errorbar(
        speed.mean(),
        accuracy.mean(),
        xerr=speed.std(ddof=1) if many else None,
        yerr=accuracy.std(ddof=1) if many else None,
        color=style["color"],
        marker=style["marker"],
        # Hollow markers once the colours repeat.
        markerfacecolor=style["color"] if k < len(COLOURS) else "white",
        linestyle="none",
        markersize=7,
        capsize=3,
        elinewidth=1,
    )
    return points[0]


FIGURES: dict[str, Callable[[Sequence[dict[str, Any]]], Figure | None]] = {
    "accuracy_matrices.png": accuracy_matrices,
    "accuracy_over_tasks.png": accuracy_over_tasks,
    "speed_against_accuracy.png": speed_against_accuracy,
    "tree.png": tree_growth,
}


def write_figures(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws all figures that the results have data for, as PNG files.

    :param results: contents of ``results.json`` files, of one stream.
    :param folder: the folder; created if it is missing.
    :return: the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        figure = draw(results)
        if figure is None:  # an earlier comparison of other methods may have left one
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
