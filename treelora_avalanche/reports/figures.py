"""Figures of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind eyes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
KINDS = {"class_incremental": "among all classes", "within_task": "among the task's own"}


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot: no global state, and no window system needed."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def _by_method(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    methods: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        methods.setdefault(result["method"], []).append(result)
    return methods


def _matrices(results: Sequence[dict[str, Any]], kind: str) -> np.ndarray:
    """Accuracy in percent, NaN where unknown. # (n_seeds, n_tasks, n_tasks)"""
    stacked = [result["accuracy_matrix"][kind] for result in results]
    return 100 * np.array(stacked, dtype=float)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def accuracy_matrices(results: Sequence[dict[str, Any]]) -> Figure:
    """Heat maps of the accuracy on each task after each task, mean over seeds.

    One column per method; the upper row is class-incremental, the lower one within the task.

    :param results: contents of `results.json` files.
    """
    methods = _by_method(results)
    n_tasks = len(results[0]["stream"]["trained"])
    side = max(2.4, 0.42 * n_tasks)
    figure = _figure(side * len(methods) + 1.6, 2 * side + 1.0)
    grid = figure.subplots(len(KINDS), len(methods), squeeze=False, sharex=True, sharey=True)
    every = max(1, n_tasks // 10)
    for row, (kind, label) in zip(grid, KINDS.items(), strict=True):
        top = kind == next(iter(KINDS))
        for axes, (method, own) in zip(row, methods.items(), strict=True):
            matrix = np.nanmean(_matrices(own, kind), axis=0)
            image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=100)
            for j, i in np.ndindex(matrix.shape):
                if n_tasks <= 12 and not np.isnan(matrix[j, i]):
                    axes.text(
                        i,
                        j,
                        f"{matrix[j, i]:.0f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="black" if matrix[j, i] > 60 else "white",
                    )
            axes.set_xticks(range(0, n_tasks, every), range(1, n_tasks + 1, every))
            axes.set_yticks(range(0, n_tasks, every), range(1, n_tasks + 1, every))
            if top:
                axes.set_title(method, fontsize=11)
        row[0].set_ylabel(label)
    figure.supxlabel("accuracy on task", fontsize=10)
    figure.supylabel("after training on task", fontsize=10)
    figure.colorbar(image, ax=list(grid.flat), label="accuracy, %", fraction=0.04, aspect=30)
    return figure


def accuracy_over_tasks(results: Sequence[dict[str, Any]]) -> Figure:
    """Mean accuracy over the tasks seen (Op_n) after each task, one line per method.

    :param results: contents of `results.json` files.
    """
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    n_tasks = len(results[0]["stream"]["trained"])
    tasks = np.arange(1, n_tasks + 1)
    for k, (method, own) in enumerate(_by_method(results).items()):
        matrices = _matrices(own, "class_incremental")
        seen = np.array([[m[n - 1, :n].mean() for n in tasks] for m in matrices])
        mean = seen.mean(axis=0)
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(tasks, mean, marker=MARKERS[k % len(MARKERS)], color=colour, label=method)
        if len(own) > 1:
            spread = seen.std(axis=0, ddof=1)
            axes.fill_between(tasks, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
    axes.set_xticks(tasks[:: max(1, n_tasks // 10)])
    axes.set_ylim(0, 102)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("mean accuracy on tasks seen, %")
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def speed_against_accuracy(results: Sequence[dict[str, Any]]) -> Figure:
    """Final accuracy against training speed, one point per method.

    :param results: contents of `results.json` files.
    """
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    for k, (method, own) in enumerate(_by_method(results).items()):
        speed = np.array([r["timings"]["samples_per_second"] for r in own])
        accuracy = np.array(
            [100 * r["metrics"]["class_incremental"]["overall_performance"] for r in own]
        )
        many = len(own) > 1
        axes.errorbar(
            speed.mean(),
            accuracy.mean(),
            xerr=speed.std(ddof=1) if many else None,
            yerr=accuracy.std(ddof=1) if many else None,
            fmt=MARKERS[k % len(MARKERS)],
            color=COLOURS[k % len(COLOURS)],
            markersize=8,
            capsize=3,
            label=f"{method} ({own[0]['epochs']} epochs per task)",
        )
    axes.set_xlim(left=0)
    axes.set_ylim(0, 102)
    axes.set_xlabel("training speed, samples per second")
    axes.set_ylabel("mean accuracy after the last task, %")
    # Beside the plot: the points may lie anywhere in it.
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    _plain(axes)
    return figure


FIGURES = {
    "accuracy_matrices.png": accuracy_matrices,
    "accuracy_over_tasks.png": accuracy_over_tasks,
    "speed_against_accuracy.png": speed_against_accuracy,
}


def write_figures(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw all figures into a folder.

    :param results: contents of `results.json` files, of one stream.
    :param folder: created if it is not there.
    :return: the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        draw(results).savefig(folder / name)
        paths.append(folder / name)
    return paths


__all__ = [
    "FIGURES",
    "accuracy_matrices",
    "accuracy_over_tasks",
    "speed_against_accuracy",
    "write_figures",
]
