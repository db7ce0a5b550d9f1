"""What all figures share."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind eyes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":")


def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot: no global state, and no window system needed.

    :param width: in inches.
    :param height: in inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    """Two spines and a faint grid.

    :param axes: where.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


__all__ = ["COLOURS", "LINES", "MARKERS", "new_figure", "plain"]
