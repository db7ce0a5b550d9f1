"""Style of all figures."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":")


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure that does not use pyplot, and so neither global state nor a display.

    :param width: width in inches.
    :param height: height in inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    """Removes two spines and adds a faint grid.

    :param axes: the axes.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


__all__ = ["COLOURS", "LINES", "MARKERS", "new_figure", "plain"]
