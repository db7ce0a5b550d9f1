"""Figure of TreeLoRA's tree as it grows, task by task."""

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
"""Number of classes named below a task."""


def tree_growth(results: Sequence[dict[str, Any]]) -> Figure | None:
    """Draws the final tree of a run above the trees after the tasks before.

    Shows the first method with a tree, under its first seed, and at most :data:`MAX_PANELS` earlier
    trees. A dot is an adapter; dots on one bar share a leaf. Colours follow the order of the tasks;
    a ring marks the last task.

    :param results: contents of ``results.json`` files.
    :return: the figure; None if no method has a tree.
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

    large = figure.add_subplot(grid[0, :])
    _TreeDrawing(large, colours, last, _names(result["stream"])).draw(trees[-1])
    for panel, task in enumerate(shown):
        axes = figure.add_subplot(grid[1 + panel // columns, panel % columns])
        _TreeDrawing(axes, colours, task).draw(trees[task])
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
    """Returns a short text on each task: its name, its domain, or some of its classes."""
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


class _TreeDrawing:
    """Draws a tree, from left to right.

    :param axes: the axes.
    :param colours: RGBA colour of each task, ``(n_tasks, 4)``.
    :param newest: index of the last task.
    :param names: texts on each task; only the large tree has them, and thresholds.
    """

    def __init__(
        self, axes: Axes, colours: np.ndarray, newest: int, names: list[str] | None = None
    ):
        self.axes = axes
        self.colours = colours
        self.newest = newest
        self.names = names
        self.n_placed = 0  # adapters so far

    def draw(self, tree: dict[str, Any]) -> None:
        """Draws the tree, and sets the limits of the axes.

        :param tree: the root.
        """
        self._place(tree, 0)
        self.axes.set_xlim(-0.7, max(self.n_placed, 1) - 0.3)
        self.axes.set_ylim(-_height(tree) - (1.3 if self.names else 0.6), 0.5)
        self.axes.axis("off")

    def _place(self, node: dict[str, Any], y: int) -> float:
        """Draws a node and its descendants; returns its x."""
        if not node["children"]:
            return self._draw_leaf(node, y)
        below = [self._place(child, y - 1) for child in node["children"]]
        x = sum(below) / len(below)
        for child in below:
            self.axes.plot([x, child, child], [y, y, y - 1], color="0.55", lw=1, zorder=1)
        if self.names:
            box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": "0.55", "lw": 0.8}
            delta = f"{node['delta']:.2g}"
            self.axes.text(x, y, delta, ha="center", va="center", fontsize=7, bbox=box, zorder=3)
        return x

    def _draw_leaf(self, node: dict[str, Any], y: int) -> float:
        begin = self.n_placed
        for tasks in node["adapters"]:
            self._draw_adapter(tasks, self.n_placed, y)
            self.n_placed += 1
        last = self.n_placed - 1
        if last > begin:
            width = 12 if self.names else 6
            self.axes.plot([begin, last], [y, y], color="0.8", lw=width, zorder=1)
        return (begin + last) / 2

    def _draw_adapter(self, tasks: list[int], x: float, y: float) -> None:
        ring = self.newest in tasks
        self.axes.scatter(
            x,
            y,
            s=300 if self.names else 90,
            color=self.colours[max(tasks)],
            edgecolors="#D55E00" if ring else "white",
            linewidths=2.0 if ring else 0.8,
            zorder=3,
        )
        self.axes.text(
            x,
            y,
            "+".join(str(task + 1) for task in tasks),
            ha="center",
            va="center_baseline",
            fontsize=(9 if self.names else 6.5) * (1 if len(tasks) == 1 else 0.7),
            color="white" if max(tasks) < 0.6 * len(self.colours) else "black",
            zorder=4,
        )
        if self.names:
            self.axes.annotate(
                "\n".join(self.names[task] for task in tasks[:2]),
                (x, y),
                (0, -13),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=7,
                color="0.25",
            )


__all__ = ["tree_growth"]
