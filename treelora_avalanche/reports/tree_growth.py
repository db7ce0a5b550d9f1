"""TreeLoRA's tree as a figure: how it has grown, task by task."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from treelora_avalanche.reports.style import new_figure

MAX_PANELS = 12
NAMED = 3
""" Classes that are named below a task. """


def tree_growth(results: Sequence[dict[str, Any]]) -> Figure | None:
    """The final tree of a run, large, above the trees after the tasks before.

    Of the methods with a tree the first is shown, with its first seed; of more than twelve tasks a
    selection. Every dot is an adapter; dots in one box share a leaf. Colours are the order of the
    tasks, and a ring marks the task that came last.

    :param results: contents of `results.json` files.
    :return: None if no method has a tree.
    """
    result = next((result for result in results if result.get("trees")), None)
    if result is None:
        return None
    trees = result["trees"]
    last = len(trees) - 1
    shown = sorted({round(k) for k in np.linspace(0, last - 1, min(last, MAX_PANELS))})
    columns = max(1, min(len(shown), 6))
    rows = -(-len(shown) // columns)
    heights = [1.9 + 0.42 * _height(trees[-1]), *[1.35] * rows]
    width = max(8.0, 0.95 * len(trees[-1]["adapters"]) + 0.5)
    figure = new_figure(width, sum(heights) + 0.4)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=heights)
    colours = colormaps["viridis"](np.linspace(0.05, 0.95, len(trees)))

    _draw(figure.add_subplot(grid[0, :]), trees[-1], colours, last, _names(result["stream"]))
    for panel, task in enumerate(shown):
        axes = figure.add_subplot(grid[1 + panel // columns, panel % columns])
        _draw(axes, trees[task], colours, task)
        axes.set_title(f"after task {task + 1}", fontsize=8)
    figure.suptitle(
        f"{result['method']}, seed {result['seed']}: the tree after task {last + 1}, with each "
        "split's threshold δ",
        fontsize=10,
    )
    return figure


def _height(node: dict[str, Any]) -> int:
    return max((1 + _height(child) for child in node["children"]), default=0)


def _names(stream: dict[str, Any]) -> list[str]:
    """A few words on each task: its name, its domain, or some of its classes."""
    if stream.get("task_names"):
        return [str(name) for name in stream["task_names"]]
    if stream.get("domain_names"):
        return [str(stream["domain_names"][task]) for task in stream["trained"]]
    names = []
    for classes in stream["classes"]:
        known = [str(stream["class_names"][label]) for label in classes[:NAMED]]
        lines = [textwrap.shorten(name.replace("_", " "), 15, placeholder="…") for name in known]
        if len(classes) > NAMED:
            lines.append(f"+ {len(classes) - NAMED}")
        names.append("\n".join(lines) if max(map(len, known)) > 2 else " ".join(lines))
    return names


def _draw(
    axes: Axes,
    tree: dict[str, Any],
    colours: np.ndarray,
    newest: int,
    names: list[str] | None = None,
) -> None:
    """Draw a tree.

    :param axes: where.
    :param tree: its root.
    :param colours: of each task, ``(n_tasks, 4)``.
    :param newest: the task that came last.
    :param names: of each task; only the large tree has them, and thresholds.
    """
    size = 300 if names else 90
    bottom = -_height(tree)
    placed = 0  # adapters so far, from left to right

    def adapter(tasks: list[int], x: float, y: float) -> None:
        ring = newest in tasks
        axes.scatter(
            x,
            y,
            s=size,
            color=colours[max(tasks)],
            edgecolors="#D55E00" if ring else "white",
            linewidths=2.0 if ring else 0.8,
            zorder=3,
        )
        axes.text(
            x,
            y,
            "+".join(str(task + 1) for task in tasks),
            ha="center",
            va="center_baseline",
            fontsize=(9 if names else 6.5) * (1 if len(tasks) == 1 else 0.7),
            color="white" if max(tasks) < 0.6 * len(colours) else "black",
            zorder=4,
        )
        if names:
            text = "\n".join(names[task] for task in tasks[:2])
            axes.annotate(
                text,
                (x, y),
                (0, -13),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=7,
                color="0.25",
            )

    def place(node: dict[str, Any], y: int) -> float:
        nonlocal placed
        if not node["children"]:
            begin = placed
            for tasks in node["adapters"]:
                adapter(tasks, placed, y)
                placed += 1
            if placed - begin > 1:
                axes.plot([begin, placed - 1], [y, y], color="0.8", lw=12 if names else 6, zorder=1)
            return (begin + placed - 1) / 2
        below = [place(child, y - 1) for child in node["children"]]
        x = sum(below) / len(below)
        for child in below:
            axes.plot([x, child, child], [y, y, y - 1], color="0.55", lw=1, zorder=1)
        if names:
            axes.text(
                x,
                y,
                f"{node['delta']:.2g}",
                ha="center",
                va="center",
                fontsize=7,
                bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "0.55", "lw": 0.8},
                zorder=3,
            )
        return x

    place(tree, 0)
    axes.set_xlim(-0.7, max(placed, 1) - 0.3)
    axes.set_ylim(bottom - (1.3 if names else 0.6), 0.5)
    axes.axis("off")


__all__ = ["tree_growth"]
