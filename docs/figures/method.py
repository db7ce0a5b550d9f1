"""Draws the README's picture of TreeLoRA: the tree of past tasks, and one training step.

    python docs/figures/method.py

One file for each of GitHub's themes, ``method_light.svg`` and ``method_dark.svg``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

WIDTH, HEIGHT = 1060, 690  # 100 units are an inch


@dataclass(frozen=True)
class Theme:
    """Colours of one version of the picture."""

    card: str
    paper: str
    line: str
    text: str
    muted: str
    frozen: str
    trained: str
    picked: str


# Okabe and Ito's blue and vermilion; lighter ones of the same hues on dark grounds.
THEMES = {
    "light": Theme(
        card="#f6f8fa",
        paper="#ffffff",
        line="#c4ccd6",
        text="#1f2328",
        muted="#59636e",
        frozen="#d5dbe3",
        trained="#0072b2",
        picked="#d55e00",
    ),
    "dark": Theme(
        card="#151b23",
        paper="#0d1117",
        line="#4a535e",
        text="#f0f6fc",
        muted="#a3adb8",
        frozen="#3d4654",
        trained="#58b4ee",
        picked="#ff9248",
    ),
}


class Canvas:
    """The few shapes of the picture, in one theme.

    :param axes: where to draw.
    :param theme: its colours.
    """

    def __init__(self, axes: Axes, theme: Theme) -> None:
        self.axes = axes
        self.theme = theme

    def box(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        """Draws a rounded box whose lower left corner is ``(x, y)``."""
        radius = style.pop("radius", 9)
        style = {
            "facecolor": self.theme.paper,
            "edgecolor": self.theme.line,
            "linewidth": 1.2,
            "zorder": 2,
        } | style
        shape = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))

    def matrix(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Draws a matrix."""
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, zorder=3))

    def text(self, x: float, y: float, text: str, size: float = 11, **style: Any) -> None:
        """Writes text, centred by default."""
        style = {"color": self.theme.text, "ha": "center", "va": "center", "zorder": 5} | style
        self.axes.text(x, y, text, fontsize=size, **style)

    def arrow(self, *points: tuple[float, float], **style: Any) -> None:
        """Draws an arrow along ``points``, with straight segments."""
        style = {"color": self.theme.muted, "linewidth": 1.5, "zorder": 4} | style
        *way, _ = points
        if len(way) > 1:
            xs, ys = zip(*way, strict=True)
            self.axes.plot(xs, ys, solid_capstyle="round", solid_joinstyle="round", **style)
        self.axes.add_patch(
            FancyArrowPatch(
                way[-1],
                points[-1],
                arrowstyle="-|>,head_length=5,head_width=2.8",
                shrinkA=0,
                shrinkB=0,
                **style,
            )
        )

    def adapter(self, x: float, y: float, colour: str, scale: float = 1.0) -> None:
        """Draws the factors B and A, centred at ``(x, y)``."""
        tall, thin, gap = 30 * scale, 9 * scale, 4 * scale
        left = x - (thin + gap + tall) / 2
        self.matrix(left, y - tall / 2, thin, tall, colour)
        self.matrix(left + thin + gap, y + tall / 2 - thin, tall, thin, colour)


# --------------------------------------------------------------------------------------------------
# Left: the tree


@dataclass(frozen=True)
class Inner:
    """An inner node, with its place and its children."""

    x: float
    y: float
    delta: str
    children: tuple[Inner | Leaf, ...]


@dataclass(frozen=True)
class Leaf:
    """A past task."""

    x: float
    task: int


LEAF_TOP = 292
TREE = Inner(
    232,
    560,
    r"$\delta_1$",
    (
        Inner(124, 470, r"$\delta_2$", (Leaf(78, 1), Leaf(162, 4))),
        Inner(
            318,
            470,
            r"$\delta_3$",
            (Inner(288, 380, r"$\delta_4$", (Leaf(246, 2), Leaf(330, 3))), Leaf(414, 5)),
        ),
    ),
)
PICKED = 3


def _holds(node: Inner | Leaf, task: int) -> bool:
    if isinstance(node, Leaf):
        return node.task == task
    return any(_holds(child, task) for child in node.children)


def _branch(canvas: Canvas, node: Inner | Leaf) -> None:
    theme, on_path = canvas.theme, _holds(node, PICKED)
    colour = theme.picked if on_path else theme.line
    if isinstance(node, Leaf):
        canvas.box(
            node.x - 36,
            LEAF_TOP - 84,
            72,
            84,
            edgecolor=colour,
            linewidth=2.4 if on_path else 1.2,
        )
        canvas.adapter(node.x, LEAF_TOP - 28, theme.picked if on_path else theme.trained)
        canvas.text(node.x, LEAF_TOP - 65, f"task {node.task}", 10.5)
        return
    for child in node.children:
        end = (child.x, LEAF_TOP if isinstance(child, Leaf) else child.y)
        if _holds(child, PICKED):
            reach = 0 if isinstance(child, Leaf) else 19
            length = ((end[0] - node.x) ** 2 + (end[1] - node.y) ** 2) ** 0.5
            share = 1 - reach / length
            tip = (node.x + share * (end[0] - node.x), node.y + share * (end[1] - node.y))
            canvas.arrow((node.x, node.y), tip, color=theme.picked, linewidth=2.6, zorder=1.5)
        else:
            canvas.axes.plot(
                (node.x, end[0]), (node.y, end[1]), color=theme.line, linewidth=1.6, zorder=1.4
            )
        _branch(canvas, child)
    canvas.axes.add_patch(
        Circle(
            (node.x, node.y),
            19,
            facecolor=theme.paper,
            edgecolor=colour,
            linewidth=2.4 if on_path else 1.2,
            zorder=2,
        )
    )
    canvas.text(node.x, node.y, node.delta, 12.5)


def _tree(canvas: Canvas) -> None:
    theme = canvas.theme
    canvas.box(6, 6, 454, HEIGHT - 12, facecolor=theme.card, edgecolor="none", radius=16, zorder=0)
    canvas.text(30, 650, "Tree of past tasks", 14.5, ha="left", weight="bold")
    canvas.text(
        30, 624, r"level $d$ splits tasks by their signatures of layer $d$", 10.5, ha="left",
        color=theme.muted,
    )  # fmt: skip
    for level, y in enumerate((560, 470, 380), start=1):
        canvas.text(30, y, f"level {level}", 10.5, ha="left", color=theme.muted)
    _branch(canvas, TREE)
    canvas.text(30, 162, "LCB search", 12, ha="left", weight="bold", color=theme.picked)
    canvas.text(
        30, 137, "in every step and layer, to the child of the smallest bound", 10.5, ha="left"
    )
    canvas.text(
        30, 98,
        r"$B = \max\,(\min_{\mathrm{children}} B,\;\mu - c\,\sigma\sqrt{\log T\,/\,n} - \delta)$",
        13, ha="left",
    )  # fmt: skip
    canvas.text(
        30, 56, r"$\mu$, $n$: mean and number of distances observed in a node", 10.5, ha="left",
        color=theme.muted,
    )  # fmt: skip
    canvas.text(
        30, 34, r"$\delta$: median distance of a node's tasks to their mean", 10.5, ha="left",
        color=theme.muted,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Right: the step

STEP = (500, 1034)
""" Left and right end of what the panel holds. """
ROW = (500, 608)
""" Bottom and top of the boxes from the batch to the optimizer. """
PROXIMAL = (246, 452)
""" Bottom and top of the box with the proximal step. """


def _forward(canvas: Canvas) -> None:
    """Draws the batch, the adapted backbone, the loss and the optimizer, in one row."""
    theme = canvas.theme
    bottom, top = ROW
    middle = (bottom + top) / 2
    boxes = {"batch": (500, 66), "backbone": (594, 216), "loss": (838, 60), "optimizer": (926, 108)}
    for x, width in boxes.values():
        canvas.box(x, bottom, width, top - bottom)
    ends = [(x, x + width) for x, width in boxes.values()]
    for (_, right), (left, _) in pairwise(ends):
        canvas.arrow((right, middle), (left, middle))
    canvas.text(533, middle, "batch")
    canvas.text(868, middle, "loss")
    canvas.text(980, middle + 9, "optimizer")
    canvas.text(980, middle - 11, "step")

    canvas.matrix(622, middle - 24, 58, 58, theme.frozen)
    canvas.text(651, middle + 5, "$W$", 13)
    canvas.text(700, middle + 5, "+", 14)
    canvas.matrix(720, middle - 24, 15, 58, theme.trained)
    canvas.matrix(741, middle + 19, 48, 15, theme.trained)
    canvas.text(765, middle - 6, "$BA$", 13, color=theme.trained)
    canvas.text(651, middle - 40, "frozen", 10.5, color=theme.muted)
    canvas.text(755, middle - 40, r"LoRA, $\theta$", 10.5, color=theme.trained)


def _proximal(canvas: Canvas) -> None:
    """Draws the proximal step: its formula, and its graph."""
    theme = canvas.theme
    bottom, top = PROXIMAL
    left, right = STEP
    canvas.box(left, bottom, right - left, top - bottom, edgecolor=theme.picked, linewidth=2.0)
    x = left + 20
    canvas.text(x, top - 28, "Proximal step", 12, ha="left", weight="bold", color=theme.picked)
    canvas.text(x, top - 52, r"towards the picked adapter $\theta_k$", 11, ha="left")
    canvas.text(
        x, top - 94, r"$\theta \;\leftarrow\; \theta_k + \mathrm{sign}(\theta-\theta_k)\,\cdot$",
        13.5, ha="left",
    )  # fmt: skip
    canvas.text(
        x + 48, top - 124, r"$\max(|\theta-\theta_k| - \alpha\lambda,\;0)$", 13.5, ha="left"
    )
    canvas.text(
        x, bottom + 43, r"$\alpha$: learning rate,  $\lambda$: strength", 10.5, ha="left",
        color=theme.muted,
    )  # fmt: skip
    canvas.text(
        x, bottom + 21, r"within $\alpha\lambda$ of $\theta_k$ a coordinate lands on it", 10.5,
        ha="left", color=theme.muted,
    )  # fmt: skip
    _graph(canvas, 908, (bottom + top) / 2 - 6)


def _graph(canvas: Canvas, x: float, y: float, half: float = 82, dead: float = 36) -> None:
    """Draws soft thresholding around the picked adapter, centred at ``(x, y)``."""
    theme, axes = canvas.theme, canvas.axes
    axes.plot((x - half, x + half), (y, y), color=theme.line, linewidth=1, zorder=3)
    axes.plot((x, x), (y - half + 8, y + half - 8), color=theme.line, linewidth=1, zorder=3)
    axes.plot(
        (x - half + 8, x + half - 8), (y - half + 8, y + half - 8),
        color=theme.muted, linewidth=1.2, linestyle=(0, (3, 3)), zorder=3,
    )  # fmt: skip
    axes.plot(
        (x - half, x - dead, x + dead, x + half),
        (y - half + dead, y, y, y + half - dead),
        color=theme.picked, linewidth=2.6, zorder=4, solid_joinstyle="round",
    )  # fmt: skip
    for edge in (x - dead, x + dead):
        axes.plot((edge, edge), (y - 5, y + 5), color=theme.muted, linewidth=1.2, zorder=5)
    canvas.text(x + dead + 13, y - 18, r"$+\alpha\lambda$", 10.5, color=theme.muted)
    canvas.text(x - dead - 6, y + 18, r"$-\alpha\lambda$", 10.5, color=theme.muted)
    canvas.axes.add_patch(Circle((x, y), 4, facecolor=theme.picked, zorder=6))
    canvas.text(x + 13, y - 17, r"$\theta_k$", 12)
    canvas.text(x + half + 12, y, r"$\theta$", 12)
    canvas.text(x, y + half + 5, r"new $\theta$", 11)


def _after(canvas: Canvas) -> None:
    """Draws what happens once an experience is learned."""
    theme = canvas.theme
    left, right = STEP
    middle, bottom, top = (left + right) / 2, 34, 178
    canvas.text(left, 204, "After the experience", 12, ha="left", weight="bold")
    width = middle - 10 - left
    for x, name in ((left, "signature into the tree"), (middle + 10, "adapter into the bank")):
        canvas.box(x, bottom, width, top - bottom)
        canvas.text(x + width / 2, top - 26, name, 11)
    canvas.text(
        left + width / 2, bottom + 72,
        r"$(\theta-\theta_0)\;/\;\Vert\theta-\theta_0\Vert_1$", 13.5, color=theme.trained,
    )  # fmt: skip
    canvas.text(
        left + width / 2, bottom + 26, r"$\theta_0$: adapter at its start", 10.5, color=theme.muted
    )
    x = middle + 10 + width / 2
    for offset in (-84, -28, 28):
        canvas.adapter(x + offset, bottom + 70, theme.frozen, 0.9)
    canvas.adapter(x + 84, bottom + 70, theme.trained, 0.9)
    canvas.text(x + 84, bottom + 26, r"$\theta$", 12, color=theme.trained)
    canvas.text(x - 28, bottom + 26, "past tasks'", 10.5, color=theme.muted)


def _step(canvas: Canvas) -> None:
    theme = canvas.theme
    canvas.box(
        480, 6, 574, HEIGHT - 12, facecolor=theme.card, edgecolor="none", radius=16, zorder=0
    )
    canvas.text(500, 650, "One training step", 14.5, ha="left", weight="bold")
    _forward(canvas)
    _proximal(canvas)
    _after(canvas)
    canvas.arrow((980, ROW[0]), (980, PROXIMAL[1]))
    canvas.arrow((533, PROXIMAL[1]), (533, ROW[0]))
    canvas.text(545, (ROW[0] + PROXIMAL[1]) / 2, "next batch", 10.5, ha="left", color=theme.muted)


def _between(canvas: Canvas) -> None:
    """Draws what goes from the tree to the step, and back."""
    theme = canvas.theme
    canvas.arrow(
        (330, LEAF_TOP - 84), (330, 186), (470, 186), (470, 350), (STEP[0], 350),
        color=theme.picked, linewidth=2.2,
    )  # fmt: skip
    canvas.arrow((STEP[0], 106), (462, 106), color=theme.trained, linewidth=2.2)
    canvas.text(400, 170, r"adapter $\theta_k$", 11, color=theme.picked)


def draw(theme: Theme) -> Figure:
    """Returns the picture.

    :param theme: its colours.
    """
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100))
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.axis("off")
    canvas = Canvas(axes, theme)
    _tree(canvas)
    _step(canvas)
    _between(canvas)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the picture in both themes.

    :param arguments: by default those of the process.
    """
    parser = argparse.ArgumentParser(description="Draw the README's picture of TreeLoRA.")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent, help="folder of the files"
    )
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the files")
    options = parser.parse_args(arguments)
    # The salt and the missing date make the same file every time.
    style = {"svg.hashsalt": "treelora", "mathtext.fontset": "dejavusans"}
    metadata = {"Date": None} if options.format == "svg" else None
    with matplotlib.rc_context(style):
        for name, theme in THEMES.items():
            path = options.output / f"method_{name}.{options.format}"
            draw(theme).savefig(path, dpi=200, metadata=metadata)
            print(path)


if __name__ == "__main__":
    main()
